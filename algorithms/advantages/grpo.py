"""GRPO: one reward, normalised within its group.

    A[j] = (r[j] - mu) / s

A group without spread teaches nothing: its advantages are 0. With several rewards GRPO would have to be told how
to combine them, so it refuses: `reward_combination` is GRPO on the weighted sum, `dvao` weighs by spread.
"""

from thornback.algorithms.advantages.base import EPS, Advantages, GroupRewards, ratio


def grpo(groups: GroupRewards, eps: float = EPS) -> Advantages:
    if len(groups.names) != 1:
        raise ValueError(
            f"grpo takes one reward, but there are {len(groups.names)} ({', '.join(groups.names)}): "
            "use reward_combination for their weighted sum, or dvao."
        )
    return Advantages.of(groups, ratio(groups.centred, groups.std[groups.group_of], eps)[:, 0])
