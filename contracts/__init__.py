"""The nouns and protocols that cross thornback's rooms. Knows neither Ray nor torch."""

from thornback.contracts.errors import (
    ActorLost,
    ConfigError,
    DataError,
    InvalidRequest,
    ModelError,
    NotImproved,
    RewardError,
    ThornbackError,
)
from thornback.contracts.generation import Engine, EngineConfig, EngineLoad, FinishReason, InFlight, Output, Request
from thornback.contracts.kv import BlockRun, KVExport, KVImport, Lease
from thornback.contracts.rollouts import (
    CACHED_VERSION,
    FINISH_REASONS,
    Anchor,
    RolloutBatch,
    anchors_from_arrow,
    anchors_to_arrow,
    offsets_of,
)
from thornback.contracts.sampling import SamplingParams
from thornback.contracts.speculation import (
    BatchRetriever,
    Retriever,
    SpeculationConfig,
    SpeculationStats,
    TokenForest,
    TokenTree,
)
from thornback.contracts.tasks import Completion, Prompt, Reward, RewardScorer, Task
from thornback.contracts.weights import STORAGE_DTYPES, TensorSpec, WeightView, weight_index

__all__ = [
    "CACHED_VERSION",
    "FINISH_REASONS",
    "STORAGE_DTYPES",
    "ActorLost",
    "Anchor",
    "BatchRetriever",
    "BlockRun",
    "Completion",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineConfig",
    "EngineLoad",
    "FinishReason",
    "InFlight",
    "InvalidRequest",
    "KVExport",
    "KVImport",
    "Lease",
    "ModelError",
    "NotImproved",
    "Output",
    "Prompt",
    "Request",
    "Retriever",
    "Reward",
    "RewardError",
    "RewardScorer",
    "RolloutBatch",
    "SamplingParams",
    "SpeculationConfig",
    "SpeculationStats",
    "Task",
    "TensorSpec",
    "ThornbackError",
    "TokenForest",
    "TokenTree",
    "WeightView",
    "anchors_from_arrow",
    "anchors_to_arrow",
    "offsets_of",
    "weight_index",
]
