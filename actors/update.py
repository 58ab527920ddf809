"""One batch of rollouts into weight updates: micro-batches, old log-probabilities, gradients, optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, distributed

from thornback.actors.microbatches import cut_microbatches
from thornback.actors.objective import Objective, PassStatistics
from thornback.actors.optimizer import Optimizer
from thornback.actors.policy import Policy
from thornback.contracts import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSpec:
    """How a batch is used; the fields are those of a recipe's algorithm and learner sections."""

    loss: str = "clip"
    loss_constants: Mapping[str, float] = field(default_factory=dict)
    aggregation: str = "token"
    fixed_length: int = 1
    kl_weight: float = 0.0
    kl_kind: str = "k3"
    importance_cap: float | None = 2.0
    epochs_per_batch: int = 1
    updates_per_epoch: int = 1
    tokens_per_microbatch: int = 16384


@dataclass(slots=True)
class UpdateReport:
    """What an update did. `metrics` are those of metrics.jsonl; `num_skipped` counts optimizer steps that were
    left out because the gradient was not finite."""

    metrics: dict[str, float]
    num_steps: int
    num_skipped: int
    seconds: float = 0.0


@dataclass(slots=True)
class MicroBatch:
    """What one forward pass needs; tensors are per response token, `[sum T]`, on the policy's device.

    `old_logprobs` None: the current policy's own, as the first update of a batch finds it.
    """

    sequences: list[np.ndarray]
    starts: list[int]
    offsets: Tensor
    advantages: Tensor
    sampled_logprobs: Tensor
    mask: Tensor
    fresh: Tensor
    old_logprobs: Tensor | None = None


class Updater:
    """Runs the updates of batches on one rank."""

    def __init__(self, policy: Policy, optimizer: Optimizer, spec: UpdateSpec, rank: int, num_ranks: int) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.spec = spec
        self.rank = rank
        self.num_ranks = num_ranks

    def run(self, batch: RolloutBatch, advantages: np.ndarray, step: int, version: int) -> UpdateReport:
        """All epochs and updates of one batch. Every rank must call it with the same arguments."""
        parts = self._parts(len(batch), step)
        ...
