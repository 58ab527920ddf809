"""What actors are made of and what they report: plain data, which a driver handles without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from thornback.contracts import EngineConfig, InteractiveTask


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """Whom the model takes turns with: `make_task` is called where it is used. `max_turns` None: as the task says. An
    environment that does not answer within `timeout` seconds has failed."""

    make_task: Callable[[], InteractiveTask]
    max_turns: int | None = None
    timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """What a rollout worker is made of. `num_threads` None: every core of its node. `memory_tokens`: so many tokens of
    rollouts, at most, are remembered to speculate from, where `engine_config.speculation` says to. `episodes` None:
    an answer is one turn. `engine_options`: keyword arguments of the engine's own, beside its config."""

    model: str
    _: KW_ONLY
    engine: str = "torch"
    engine_config: EngineConfig = field(default_factory=EngineConfig)
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    num_threads: int | None = None
    memory_tokens: int = 0
    episodes: EpisodeSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """What is trained, and how it is held.

    `dtype` is the type of computation and of the published weights ("auto": float32 on CPU, bfloat16 on CUDA);
    the trained weights themselves are always float32, since a learning rate of 1e-6 vanishes in bfloat16.
    `lora`: rank, alpha and target modules of adapters, or None to train everything. `with_reference`: keep the
    starting model too, for the KL.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    strategy: str = "ddp"
    lora: tuple[int, float, str | tuple[str, ...]] | None = None
    with_reference: bool = False
    gradient_checkpointing: bool = False
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """AdamW and its schedule; the fields are those of the learner's section of a recipe."""

    learning_rate: float = 1e-6
    schedule: str = "constant"
    final_learning_rate_share: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0

    def learning_rate_at(self, step: int) -> float:
        """The rate of step `step`, counted from 0: a function of the step alone, so that a resumed run agrees."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        falling = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_learning_rate_share + (1.0 - self.final_learning_rate_share) * falling)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSpec:
    """How a batch is used. `loss_options` are keyword arguments of `algorithms.losses.policy_loss`; `max_tokens` is
    the longest response that is allowed, the length of the fixed aggregation."""

    loss_options: Mapping[str, str | float | None] = field(default_factory=dict)
    max_tokens: int = 1
    epochs_per_batch: int = 1
    updates_per_epoch: int = 1
    tokens_per_microbatch: int = 16384

    @property
    def needs_reference(self) -> bool:
        return bool(self.loss_options.get("kl_weight"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a learner group is made of. `num_threads` None: the node's cores, shared by its ranks."""

    policy: PolicySpec
    optimizer: OptimizerSpec
    update: UpdateSpec
    num_ranks: int = 1
    num_threads: int | None = None
    timeout: float = 600.0


@dataclass(slots=True)
class UpdateReport:
    """What an update did: `metrics` with the keys of metrics.jsonl; `num_skipped` optimizer steps were left out
    because their gradient was not finite; `num_trained` rollouts had something to teach."""

    metrics: dict[str, float]
    num_steps: int
    num_skipped: int
    num_trained: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLearnerSpec:
    """What a draft learner is made of: `draft`, the directory of a head for `model`; `updates` optimizer steps of a
    refresh; of the newest rollouts it learns from `max_tokens` tokens. `num_threads` None: every core of its node."""

    model: str
    draft: str
    updates: int = 20
    learning_rate: float = 5e-4
    max_tokens: int = 1 << 22
    num_threads: int | None = None


@dataclass(frozen=True, slots=True)
class DraftReport:
    """Where a draft head is: optimizer steps behind it; rollouts that it learned from, or is yet to learn from; and how
    often its first choice was the policy's, before it learned (NaN: nobody looked)."""

    num_updates: int
    num_rollouts: int
    agreement: float = math.nan
