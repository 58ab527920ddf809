"""RLOO: the weighted sum of rewards less the mean of the group's other rollouts.

    A[j] = sum_k w[k] (r[j, k] - mean_{i != j} r[i, k]) = sum_k w[k] G / (G - 1) (r[j, k] - mu[k])

The baseline does not depend on the rollout itself, so the gradient is unbiased. A group of one has no others.
"""

import numpy as np

from thornback.algorithms.advantages.base import Advantages, GroupRewards


def rloo(groups: GroupRewards) -> Advantages:
    if (np.diff(groups.group_offsets) < 2).any():
        raise ValueError("rloo compares each rollout with the others of its prompt: groups need at least 2 rollouts.")
    others = np.maximum(groups.count - 1, 1)
    return Advantages.of(groups, (groups.centred * (groups.count / others)[groups.group_of]) @ groups.weights)
