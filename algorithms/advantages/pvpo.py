"""PVPO (arXiv 2508.21104; papers.md section 2): the reference policy's value is the baseline.

    A[j] = r[j] - V,   V[q] the mean reward of reference rollouts, estimated once

The baseline does not come from the group, so a group needs few rollouts, and one in which all do equally well
still says whether that is better than the reference. No division by a spread. With several rewards (ours) their
weighted sum is compared: A[j] = sum_k w[k] (r[j, k] - V[k]).
"""

from thornback.algorithms.advantages.base import Advantages, GroupRewards


def pvpo(groups: GroupRewards) -> Advantages:
    return Advantages.of(groups, groups.less(groups.needed_anchors("pvpo")) @ groups.weights)
