"""CISPO (MiniMax-M1): the clipped ratio is a constant weight, so that no token loses its gradient.

-clip(ratio, 1 - clip_low, 1 + clip_high).detach() A log pi
"""

from thornback.algorithms.losses.base import TokenBatch, TokenLoss


def cispo(batch: TokenBatch, clip_low: float, clip_high: float) -> TokenLoss:
    ratio = (batch.logprobs - batch.old_logprobs).exp().detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLoss(-weight * batch.advantages * batch.logprobs, ratio < 1 - clip_low, ratio > 1 + clip_high)
