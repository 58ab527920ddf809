"""DVAO (arXiv 2605.25604; papers.md section 1): rewards weighted by how far they tell a group's rollouts apart.

    w~[k] = w[k] s[k] / sum_l w[l] s[l]
    A[j]  = sum_k w~[k] (r[j, k] - mu[k]) / s[k] = sum_k w[k] (r[j, k] - mu[k]) / sum_l w[l] s[l]

The second form is computed: it divides by no s[k]. A is reward combination's advantage times a factor in [0, 1]
that shrinks where the rewards contradict each other. Where the denominator is below eps the advantage is 0.

`weight_floor` and `weight_cap` (ours; off by default) bound every w~[k] before they are divided by their sum: a
noisy reward of high variance is up-weighted by design, and groups of four and less know s only roughly.
"""

from __future__ import annotations

import numpy as np

from thornback.algorithms.advantages.base import EPS, Advantages, GroupRewards, ratio


def dvao(
    groups: GroupRewards, eps: float = EPS, weight_floor: float | None = None, weight_cap: float | None = None
) -> Advantages:
    weights = spread_weights(groups, eps, weight_floor, weight_cap)
    if weight_floor is None and weight_cap is None:
        spread = groups.std @ groups.weights
        values = ratio(groups.centred @ groups.weights, spread[groups.group_of], eps)
    else:
        normalised = ratio(groups.centred, groups.std[groups.group_of], eps)
        values = (weights[groups.group_of] * normalised).sum(1)
    return Advantages.of(groups, values, weights)


def spread_weights(
    groups: GroupRewards, eps: float, weight_floor: float | None = None, weight_cap: float | None = None
) -> np.ndarray:
    """w~ `[Q, K]`: rows sum to 1, or are 0 where a group has no spread in any reward."""
    weighted = groups.std * groups.weights
    total = weighted.sum(1, keepdims=True)
    weights = ratio(weighted, np.broadcast_to(total, weighted.shape), eps)
    if weight_floor is None and weight_cap is None:
        return weights
    bounded = np.clip(weights, weight_floor or 0.0, 1.0 if weight_cap is None else weight_cap)
    bounded *= (groups.weights > 0) & (total >= eps)
    return ratio(bounded, np.broadcast_to(bounded.sum(1, keepdims=True), bounded.shape), eps)
