"""Anchored DVAO (ours; neither paper has it): PVPO's anchors, one per reward, under DVAO's weights.

    a[k] = sqrt(mean_j (r[j, k] - V[k])^2)                  the spread around the anchor
    A[j] = sum_k w~[k] (r[j, k] - V[k]) / a[k]              w~[k] = w[k] s[k] / sum_l w[l] s[l] as in DVAO

A rollout is compared with what the reference policy was worth, reward by reward, and a reward counts by how far it
tells the group's rollouts apart. With V = mu this is DVAO exactly.

Dividing by the spread s around the group's own mean instead would let an anchor far from a group of small spread
blow the advantage up without bound; around the anchor, mean_j ((r - V) / a)^2 = 1, so |A[j]| <= sqrt(G) always.
Where no reward has spread, w~ and so the advantage are 0: such a group's rollouts differ from the reference, but
not from each other, and a common advantage only adds noise (the score function's mean is 0). A reward without an
anchor (NaN: it never applied to the reference) takes the group's mean for one.
"""

from __future__ import annotations

import numpy as np

from thornback.algorithms.advantages.base import EPS, Advantages, GroupRewards, ratio
from thornback.algorithms.advantages.dvao import spread_weights


def anchored_dvao(
    groups: GroupRewards, eps: float = EPS, weight_floor: float | None = None, weight_cap: float | None = None
) -> Advantages:
    anchors = groups.needed_anchors("anchored_dvao")
    deviations = groups.less(np.where(np.isnan(anchors), groups.mean, anchors))
    normalised = ratio(deviations, groups.rms(deviations)[groups.group_of], eps)
    weights = spread_weights(groups, eps, weight_floor, weight_cap)
    return Advantages.of(groups, (weights[groups.group_of] * normalised).sum(1), weights)
