"""Ray actors, one file a role, and what keeps them alive. Floor 2: knows engine, data, algorithms and contracts."""

from thornback.actors.learner import LearnerSpec
from thornback.actors.learner_group import LearnerGroup, LearnerLost
from thornback.actors.optimizer import OptimizerSpec
from thornback.actors.policy import PolicySpec
from thornback.actors.pool import ActorPool
from thornback.actors.reward_model import RewardModel, RewardTable
from thornback.actors.rollout_worker import GenerationReport, PromptShard, RolloutSpec, RolloutWorker
from thornback.actors.supervision import Home, Restarts, actor_options
from thornback.actors.update import UpdateReport, UpdateSpec
from thornback.actors.weight_store import PublishedWeights, WeightStore

__all__ = [
    "ActorPool",
    "GenerationReport",
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
]
