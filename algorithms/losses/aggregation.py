"""How token losses become one number, whatever the micro-batches.

token:    mean over the batch's tokens (DAPO): long responses count more.
sequence: mean over sequences of their tokens' mean (GRPO, PVPO): each response counts the same.
fixed:    sums over a fixed length, mean over sequences (Dr. GRPO): no length bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thornback.algorithms.losses.base import TokenBatch

Aggregation = Literal["token", "sequence", "fixed"]


@dataclass(frozen=True, slots=True)
class BatchTotals:
    """Sizes of the whole batch that one optimizer step sees, over all micro-batches and ranks: tokens with mask 1,
    sequences, and the fixed length (the longest response that is allowed)."""

    tokens: int
    sequences: int
    max_tokens: int


def token_weights(batch: TokenBatch, aggregation: Aggregation, totals: BatchTotals) -> Tensor:
    """`[T]`: the loss is the sum of token losses times these. Adding micro-batches up gives the batch's loss."""
    if aggregation == "token":
        return batch.mask / max(totals.tokens, 1)
    if aggregation == "fixed":
        return batch.mask / (totals.sequences * totals.max_tokens)
    if aggregation == "sequence":
        counts = batch.sequence_sums(torch.ones_like(batch.logprobs.detach())).clamp_min(1)
        return batch.mask / (counts[batch.sequence_index] * totals.sequences)
    raise ValueError(f"there is no aggregation {aggregation}: token, sequence and fixed are.")
