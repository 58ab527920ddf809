"""Dr. GRPO: the weighted sum of rewards less its group's mean, not divided by a spread.

    A[j] = sum_k w[k] (r[j, k] - mu[k])

Dividing by the spread makes groups that are almost always right, or wrong, count more; leaving it out keeps the
policy gradient unbiased. It goes with the `fixed` aggregation of the loss.
"""

from thornback.algorithms.advantages.base import Advantages, GroupRewards


def dr_grpo(groups: GroupRewards) -> Advantages:
    return Advantages.of(groups, groups.centred @ groups.weights)
