"""What every policy loss takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class TokenBatch:
    """T response tokens of whole sequences, end to end. All float32 `[T]` but where said.

    `logprobs`: under the policy being trained, with gradients. `old_logprobs`: under the policy at the start of
    the batch's updates, the ratio's denominator (for a cached right trajectory: those of the model that wrote it).
    `sampling_logprobs`: as the engine reported them. `reference_logprobs`: under the reference policy, for a KL.
    `advantages`: each token's. `mask`: 1 where the model wrote the token. `sequence_index` int64: its sequence,
    counted from 0.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    sampling_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequence_index: Tensor
    reference_logprobs: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("old_logprobs", "sampling_logprobs", "advantages", "mask", "sequence_index"):
            if getattr(self, name).shape != self.logprobs.shape:
                raise ValueError(
                    f"{name} has shape {tuple(getattr(self, name).shape)}, logprobs {tuple(self.logprobs.shape)}."
                )

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Sums of masked `values` `[T]` over each sequence: `[S]`."""
        size = int(self.sequence_index[-1]) + 1 if len(self.sequence_index) else 0
        return values.new_zeros(size).index_add_(0, self.sequence_index, values * self.mask)

    def sequence_means(self, values: Tensor) -> Tensor:
        """Each token's sequence's mean of masked `values`: `[T]`."""
        counts = self.sequence_sums(torch.ones_like(values)).clamp_min(1)
        return (self.sequence_sums(values) / counts)[self.sequence_index]


@dataclass(slots=True)
class TokenLoss:
    """`values` `[T]`: each token's loss, before masking; `clipped_low` and `clipped_high` `[T]`: 1 where the ratio's
    bound took the gradient away."""

    values: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class PolicyLoss(Protocol):
    def __call__(self, batch: TokenBatch, clip_low: float, clip_high: float) -> TokenLoss: ...


@dataclass(slots=True)
class LossOutput:
    """`loss`: a scalar with gradients, this micro-batch's share of the batch's. `sums` and `maxima`: what to add,
    or take the largest of, over micro-batches and ranks; `sums["tokens"]` turns sums into means."""

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
