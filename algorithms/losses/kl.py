"""Estimators of the KL divergence KL(pi || pi_ref) from sampled tokens, with x = log pi - log pi_ref.

k1: x. Unbiased as a value; its gradient as a loss has mean 0, so it regularises nothing by itself.
k2: x^2 / 2. Biased as a value; its gradient is that of the KL.
k3: exp(-x) - 1 + x. Unbiased and never negative as a value; its gradient is that of KL(pi_ref || pi).
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_penalty(logprobs: Tensor, reference_logprobs: Tensor, kind: str) -> Tensor:
    """`[T]` for log-probabilities `[T]` of sampled tokens; `kind` is k1, k2 or k3."""
    x = logprobs - reference_logprobs
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x**2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"there is no KL estimator {kind}: k1, k2 and k3 are.")
