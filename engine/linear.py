"""Matrix products through oneDNN where that is faster: float32 on CPU, enough rows.

torch multiplies float32 matrices with MKL, which on AMD processors leaves half of their vector units idle: 100 Gflop/s
a core where oneDNN reaches 200. oneDNN takes the plain weight, so that mapped buffers stay what they are; an engine
over a small model keeps a copy of the weights in oneDNN's own order besides, which spares each product a reordering.
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

    ordered: Tensor | None = None  # the weight in oneDNN's order

    def forward(self, x: Tensor) -> Tensor:
        if not _worth_it(x, self.weight, self.out_features):
            return functional.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _Product.apply(x, self.weight, self.bias)
        return _product(x, self.weight if self.ordered is None else self.ordered, self.bias)


class Joint:
    """Layers that share their input, as one product over a copy of their weights in oneDNN's order."""

    def __init__(self, layers: list[FastLinear], rows: int) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.outputs = [layer.out_features for layer in layers]
        self.weight = _ordered(weight, rows)
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's outputs for `x` `[T, I]`: columns of one tensor."""
        return _product(x, self.weight, self.bias).split(self.outputs, -1)

    def fits(self, x: Tensor) -> bool:
        return not torch.is_grad_enabled() and _worth_it(x, self.weight, sum(self.outputs))


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
    if sum(w.nbytes for w in weights) > _MAX_ORDERED or any(
        w.dtype != torch.float32 or w.device.type != "cpu" for w in weights
    ):
        return
    joined: set[nn.Module] = set()
    for module in model.modules():
        for name, parts in getattr(module, "JOINTS", {}).items():
            members = [getattr(module, part) for part in parts]
            # A layer that somebody watches or wraps (an adapter) must be called itself.
            if all(isinstance(m, FastLinear) and not m._forward_hooks for m in members):
                setattr(module, name, Joint(members, rows))
                joined.update(members)
    for layer in layers:
        if layer not in joined:
            layer.ordered = _ordered(layer.weight.detach(), rows)


def _ordered(weight: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
