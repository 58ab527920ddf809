"""Policy losses: from advantages to a scalar to minimise. One file an idea."""

from __future__ import annotations

import torch

from thornback.algorithms.losses.aggregation import Aggregation, BatchTotals, token_weights
from thornback.algorithms.losses.base import LossOutput, PolicyLoss, TokenBatch, TokenLoss
from thornback.algorithms.losses.cispo import cispo
from thornback.algorithms.losses.clip import clip
from thornback.algorithms.losses.gspo import gspo
from thornback.algorithms.losses.importance import truncated_importance_weights
from thornback.algorithms.losses.kl import kl_penalty

LOSSES: dict[str, PolicyLoss] = {"clip": clip, "gspo": gspo, "cispo": cispo}


def policy_loss(
    batch: TokenBatch,
    totals: BatchTotals,
    *,
    loss: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: Aggregation = "token",
    kl_weight: float = 0.0,
    kl_kind: str = "k3",
    importance_cap: float | None = None,
) -> LossOutput:
    """One micro-batch's share of the loss: importance weights times the policy loss, plus the KL penalty, aggregated.

    `sums` (over masked tokens): tokens, clipped_low, clipped_high, mismatch (absolute difference between the
    log-probabilities at sampling and at training), importance_weight, kl. `maxima`: mismatch. The size of the
    mismatch is measured whether or not it is corrected for.
    """
    terms = LOSSES[loss](batch, clip_low, clip_high)
    correction = truncated_importance_weights(batch.old_logprobs, batch.sampling_logprobs, importance_cap)
    values = terms.values * correction
    sums = {}
    if batch.reference_logprobs is not None:
        kl = kl_penalty(batch.logprobs, batch.reference_logprobs, kl_kind)
        values = values + kl_weight * kl
        sums["kl"] = kl.detach()
    with torch.no_grad():
        mismatch = (batch.old_logprobs - batch.sampling_logprobs).abs()
        sums |= {
            "tokens": torch.ones_like(mismatch),
            "clipped_low": terms.clipped_low.float(),
            "clipped_high": terms.clipped_high.float(),
            "mismatch": mismatch,
            "importance_weight": correction,
        }
        sums = {name: (value * batch.mask).sum() for name, value in sums.items()}
        largest = (mismatch * batch.mask).amax() if len(mismatch) else mismatch.sum()
    return LossOutput((values * token_weights(batch, aggregation, totals)).sum(), sums, {"mismatch": largest})


__all__ = [
    "LOSSES",
    "BatchTotals",
    "LossOutput",
    "PolicyLoss",
    "TokenBatch",
    "TokenLoss",
    "kl_penalty",
    "policy_loss",
    "token_weights",
    "truncated_importance_weights",
]
