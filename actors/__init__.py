"""Ray actors, one file a role, and what keeps them alive. Floor 2: knows engine, data, algorithms and contracts.

Names load when they are first used: reading a path needs neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thornback.actors.anchor_sampler import AnchorSampler, anchors_of
    from thornback.actors.draft_learner import DraftLearner
    from thornback.actors.learner_group import LearnerGroup
    from thornback.actors.pool import LOST_CALL, ActorPool, Flight
    from thornback.actors.reward_model import RewardModel, RewardTable
    from thornback.actors.rollout_worker import GenerationReport, GroupReport, PromptShard, RolloutWorker
    from thornback.actors.specs import (
        DraftLearnerSpec,
        DraftReport,
        EpisodeSpec,
        LearnerSpec,
        OptimizerSpec,
        PolicySpec,
        RolloutSpec,
        UpdateReport,
        UpdateSpec,
    )
    from thornback.actors.supervision import DataLost, Home, LearnerLost, Restarts, actor_options
    from thornback.actors.weight_store import PublishedWeights, WeightStore

_EXPORTS = {
    "anchor_sampler": "AnchorSampler anchors_of",
    "draft_learner": "DraftLearner",
    "learner_group": "LearnerGroup",
    "pool": "ActorPool Flight LOST_CALL",
    "reward_model": "RewardModel RewardTable",
    "rollout_worker": "GenerationReport GroupReport PromptShard RolloutWorker",
    "specs": "DraftLearnerSpec DraftReport EpisodeSpec LearnerSpec OptimizerSpec PolicySpec RolloutSpec "
    "UpdateReport UpdateSpec",
    "supervision": "DataLost Home LearnerLost Restarts actor_options",
    "weight_store": "PublishedWeights WeightStore",
}
_HOME_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = [
    "LOST_CALL",
    "ActorPool",
    "AnchorSampler",
    "DataLost",
    "DraftLearner",
    "DraftLearnerSpec",
    "DraftReport",
    "EpisodeSpec",
    "Flight",
    "GenerationReport",
    "GroupReport",
    "Home",
    "LearnerGroup",
    "LearnerLost",
    "LearnerSpec",
    "OptimizerSpec",
    "PolicySpec",
    "PromptShard",
    "PublishedWeights",
    "Restarts",
    "RewardModel",
    "RewardTable",
    "RolloutSpec",
    "RolloutWorker",
    "UpdateReport",
    "UpdateSpec",
    "WeightStore",
    "actor_options",
    "anchors_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
