"""PPO's clipped token ratio, with separate bounds (DAPO).

    -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A),   ratio = pi / pi_old of each token

A wider upper bound lets unlikely tokens grow (DAPO: 0.2 below, 0.28 above).
"""

import torch

from thornback.algorithms.losses.base import TokenBatch, TokenLoss


def clip(batch: TokenBatch, clip_low: float, clip_high: float) -> TokenLoss:
    ratio = (batch.logprobs - batch.old_logprobs).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    values = -torch.minimum(ratio * batch.advantages, bounded * batch.advantages)
    low = (ratio < 1 - clip_low) & (batch.advantages < 0)
    high = (ratio > 1 + clip_high) & (batch.advantages > 0)
    return TokenLoss(values, low, high)
