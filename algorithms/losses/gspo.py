"""GSPO: one ratio a sequence, the geometric mean of its tokens' ratios.

    s = exp(mean_t (log pi - log pi_old));   -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)

Every token of a sequence carries the sequence's loss, so that any aggregation applies; the `sequence` one is the
paper's. The bounds are far narrower than a token ratio's (3e-4 and 4e-4).
"""

import torch

from thornback.algorithms.losses.base import TokenBatch, TokenLoss


def gspo(batch: TokenBatch, clip_low: float, clip_high: float) -> TokenLoss:
    ratio = batch.sequence_means(batch.logprobs - batch.old_logprobs).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    values = -torch.minimum(ratio * batch.advantages, bounded * batch.advantages)
    low = (ratio < 1 - clip_low) & (batch.advantages < 0)
    high = (ratio > 1 + clip_high) & (batch.advantages > 0)
    return TokenLoss(values, low, high)
