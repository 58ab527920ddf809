"""Attention of a learner: plain and causal within each of several sequences that are packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def size_class(length: int) -> int:
    """Lengths within a factor of two of each other share a padded group."""
    return max(int(length) - 1, 31).bit_length()


class _Spread(torch.autograd.Function):
    """Packed tokens `[T, ...]` to padded places `[B * S, ...]`; a token may stand in several places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(rows, real)
        ctx.num_tokens = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, real = ctx.saved_tensors
        out = grad.new_zeros(ctx.num_tokens, *grad.shape[1:])
        return out.index_add_(0, rows[real], grad.index_select(0, real)), None, None


class _Collect(torch.autograd.Function):
    """Padded places `[B * S, ...]` to the packed tokens that stand there; the inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.num_places = len(x)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_places, *grad.shape[1:]).index_copy_(0, back, grad), None


@dataclass(slots=True)
class PackedGroup:
    """Sequences of like length as `[B, S]` places. `rows` `[B * S]`: the packed token of each place (padding
    repeats row 0); `real`: the places that are no padding; `tokens` and `back`: which packed tokens take their
    result from this group, and from which place."""

    shape: tuple[int, int]
    rows: Tensor
    real: Tensor
    tokens: Tensor
    back: Tensor


@dataclass(slots=True)
class PackedBatch:
    """Causal attention within each of several sequences; sequences that begin alike may share packed tokens."""

    groups: list[PackedGroup]

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray], device: torch.device) -> PackedBatch:
        """`sequences[i]`: the packed rows that sequence i consists of, in order."""
        classes: dict[int, list[np.ndarray]] = {}
        for rows in sequences:
            classes.setdefault(size_class(len(rows)), []).append(rows)
        taken = np.zeros(1 + max(int(rows.max()) for rows in sequences), bool)
        groups = []
        for members in classes.values():
            lengths = np.asarray([len(rows) for rows in members])
            inside = np.arange(lengths.max()) < lengths[:, None]
            spread = np.zeros(inside.shape, np.int64)
            spread[inside] = np.concatenate(members)
            real = np.flatnonzero(inside)
            tokens, first = np.unique(spread.ravel()[real], return_index=True)
            new = ~taken[tokens]
            taken[tokens] = True
            arrays = (spread.ravel(), real, tokens[new], real[first[new]])
            on_device = (torch.from_numpy(a).to(device) for a in arrays)
            groups.append(PackedGroup((len(members), int(lengths.max())), *on_device))
        return cls(groups)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """`[T, heads, D]`; padding stands after a sequence's tokens, so that causality alone hides it."""
        del layer
        parts = []
        for group in self.groups:
            queries, keys, values = (
                _Spread.apply(x, group.rows, group.real).view(*group.shape, *x.shape[1:]).transpose(1, 2)
                for x in (q, k, v)
            )
            mask = _window_mask(group.shape[1], window, q.device)
            out = scaled_dot_product_attention(
                queries, keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            parts.append(_Collect.apply(out.transpose(1, 2).flatten(0, 1), group.back))
        if len(parts) == 1:
            return parts[0]  # its tokens are all of them, in order
        order = torch.cat([group.tokens for group in self.groups])
        return torch.cat(parts)[torch.argsort(order)]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool `[length, length]`, or None where plain causality is enough."""
    if window is None or window >= length:
        return None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)
