"""Matrix products through oneDNN where that is faster: float32 on CPU, enough rows.

torch multiplies float32 matrices with MKL, which on AMD processors leaves half of their vector units idle: 100 Gflop/s
a core where oneDNN reaches 200. oneDNN takes the plain weight, so that mapped buffers stay what they are; an engine over
a small model keeps a copy of the weights in oneDNN's own order besides, which spares each product the reordering.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_MIN_ROWS = 16
_MIN_PRODUCT = 1 << 20  # multiplications below which the call itself costs more than is won
_MAX_ORDERED = 64 << 20  # bytes of weights: reading more from memory costs more than the reordering


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., I]` times `weight` `[O, I]` transposed, plus `bias` `[O]`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """The product with gradients; oneDNN's operator has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad.contiguous(), weight.t()) if of_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,  # here oneDNN is no faster
            rows.sum(0) if ctx.has_bias and of_bias else None,
        )


class FastLinear(nn.Linear):
    """`nn.Linear`, faster where it can be."""

    ordered: Tensor | None = None  # the weight in oneDNN's order

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        fast = rows >= _MIN_ROWS and rows * self.in_features * self.out_features >= _MIN_PRODUCT
        if not fast or x.dtype != torch.float32 or x.device.type != "cpu" or self.weight.dtype != torch.float32:
            return functional.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return _product(x, self.weight if self.ordered is None else self.ordered, self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Turn a model's linear layers into fast ones; weights, names and ties stay as they are."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear


def order_weights(model: nn.Module, rows: int) -> None:
    """Keep copies of a small model's weights in oneDNN's order, best for products of `rows` rows; to be called again
    whenever the weights have changed, and never where they are trained."""
    layers = [module for module in model.modules() if isinstance(module, FastLinear)]
    weights = {id(layer.weight): layer.weight for layer in layers}.values()
    small = sum(weight.nbytes for weight in weights) <= _MAX_ORDERED
    for layer in layers:
        weight = layer.weight.detach()
        if small and weight.dtype == torch.float32 and weight.device.type == "cpu":
            layer.ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
