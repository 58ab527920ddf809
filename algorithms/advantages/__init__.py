"""Advantage estimators: one file each, from a group's rewards to one number a rollout."""

from thornback.algorithms.advantages.advantage_combination import advantage_combination
from thornback.algorithms.advantages.anchored_dvao import anchored_dvao
from thornback.algorithms.advantages.base import Advantages, Estimator, GroupRewards
from thornback.algorithms.advantages.dr_grpo import dr_grpo
from thornback.algorithms.advantages.dvao import dvao
from thornback.algorithms.advantages.gdpo import gdpo
from thornback.algorithms.advantages.grpo import grpo
from thornback.algorithms.advantages.pvpo import pvpo
from thornback.algorithms.advantages.reward_combination import reward_combination
from thornback.algorithms.advantages.rloo import rloo

ESTIMATORS: dict[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reward_combination": reward_combination,
    "advantage_combination": advantage_combination,
    "gdpo": gdpo,
    "dvao": dvao,
    "pvpo": pvpo,
    "anchored_dvao": anchored_dvao,
}
ANCHORED = frozenset({"pvpo", "anchored_dvao"})  # these need anchors

__all__ = ["ANCHORED", "ESTIMATORS", "Advantages", "Estimator", "GroupRewards"]
