"""GDPO: advantage combination, then whitened over the whole batch.

    A = AC;  A <- (A - mean A) / std A      (over all rollouts of the batch)

Whitening keeps the size of an update the same as the number of rewards grows; it also scales noise up where most
groups have nothing left to learn. A batch without spread has advantage 0.
"""

import numpy as np

from thornback.algorithms.advantages.advantage_combination import advantage_combination
from thornback.algorithms.advantages.base import EPS, Advantages, GroupRewards, ratio


def gdpo(groups: GroupRewards, eps: float = EPS) -> Advantages:
    values = advantage_combination(groups, eps).values
    centred = values - values.mean()
    return Advantages.of(groups, ratio(centred, np.full(len(values), values.std()), eps))
