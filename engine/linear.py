"""Matrix products through oneDNN where that is faster: float32 on CPU, enough rows.

torch multiplies float32 matrices with MKL, which on AMD processors leaves half of their vector units idle: 100 Gflop/s
a core where oneDNN reaches 200. oneDNN takes the plain weight, so that mapped buffers stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_MIN_ROWS = 16
_MIN_PRODUCT = 1 << 20  # multiplications below which the call itself costs more than is won


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
            _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if of_weight else None,
            rows.sum(0) if ctx.has_bias and of_bias else None,
        )


def _worth_it(x: Tensor, weight: Tensor, outputs: int) -> bool:
    """Whether oneDNN is faster for `x` `[..., I]` times `weight`, with so many outputs."""
    rows = x.numel() // x.shape[-1]
    large = rows >= _MIN_ROWS and x.numel() * outputs >= _MIN_PRODUCT
    return large and x.dtype == torch.float32 and x.device.type == "cpu" and weight.dtype == torch.float32


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` `[T, O]` transposed times `x` `[T, I]`; oneDNN copies its left side, so that is the narrower one."""
    if grad.shape[1] <= x.shape[1]:
        return _product(grad.t(), x.t())
    return _product(x.t(), grad.t()).t().contiguous()


class FastLinear(nn.Linear):
    """`nn.Linear`, faster where it can be."""

    def forward(self, x: Tensor) -> Tensor:
        if not _worth_it(x, self.weight, self.out_features):
            return functional.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)


def use_fast_products(model: nn.Module) -> None:
    """Turn a model's linear layers into fast ones; weights, names and ties stay as they are."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
