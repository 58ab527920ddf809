"""Reward combination (RC, papers.md section 1): GRPO on the weighted sum of the rewards.

    R[j] = sum_k w[k] r[j, k];  A[j] = (R[j] - mean R) / std R

Its size is always 1 (mean square over a group), however much the rewards contradict each other; a reward that is
rare but large drowns the others. A reward without spread contributes nothing, one that does not apply to a
rollout leaves that rollout's term at the group's mean.
"""

import numpy as np

from thornback.algorithms.advantages.base import EPS, Advantages, GroupRewards, ratio


def reward_combination(groups: GroupRewards, eps: float = EPS) -> Advantages:
    live = groups.std >= eps
    combined = (groups.centred * live[groups.group_of]) @ groups.weights
    sizes = np.diff(groups.group_offsets)
    combined -= (groups.sum_groups(combined) / sizes)[groups.group_of]  # not 0 only where rewards do not apply
    spread = np.sqrt(groups.sum_groups(combined**2) / sizes)
    return Advantages.of(groups, ratio(combined, spread[groups.group_of], eps))
