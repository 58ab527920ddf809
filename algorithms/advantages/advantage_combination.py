"""Advantage combination (AC, papers.md section 1): each reward normalised by itself, then added up.

    A[j, k] = (r[j, k] - mu[k]) / s[k];  A[j] = sum_k w[k] A[j, k]

A reward with hardly any spread weighs as much as one that tells the rollouts apart. A reward with none (s < eps)
contributes 0.
"""

from thornback.algorithms.advantages.base import EPS, Advantages, GroupRewards, ratio


def advantage_combination(groups: GroupRewards, eps: float = EPS) -> Advantages:
    return Advantages.of(groups, ratio(groups.centred, groups.std[groups.group_of], eps) @ groups.weights)
