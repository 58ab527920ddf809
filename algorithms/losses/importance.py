"""Correction for an engine that samples from a slightly different distribution than the trainer computes."""

from __future__ import annotations

from torch import Tensor


def truncated_importance_weights(old_logprobs: Tensor, sampling_logprobs: Tensor, cap: float | None) -> Tensor:
    """min(pi_old / pi_sampling, cap), detached, `[T]`; all 1 where `cap` is None."""
    ratio = (old_logprobs - sampling_logprobs).detach().exp()
    return ratio.clamp(max=cap) if cap is not None else ratio.new_ones(ratio.shape)
