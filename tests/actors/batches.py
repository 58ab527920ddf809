"""Rollouts for the learner's tests, made by a rollout worker in this process."""

from __future__ import annotations

from functools import cache

import numpy as np

from thornback.actors import LearnerSpec, OptimizerSpec, PolicySpec, PromptShard, RolloutSpec, UpdateSpec
from thornback.actors.learner import LearnerCore
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import RolloutBatch, SamplingParams

SHARD = PromptShard(
    keys=("a", "b", "c", "d"),
    token_ids=tuple(tuple(range(20 + 3 * i, 28 + 5 * i)) for i in range(4)),
    seeds=(100, 200, 300, 400),
)
SAMPLING = SamplingParams(n=4, max_tokens=12)


def worker(model) -> RolloutWorkerCore:
    core = RolloutWorkerCore(RolloutSpec(str(model), num_threads=1))
    core.setup()
    return core


@cache
def rollouts(model) -> RolloutBatch:
    return worker(model).generate(SHARD, SAMPLING, 0)[0]


def advantages(batch: RolloutBatch) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=len(batch))
    values[::5] = 0.0
    return values


def learner_spec(model, *, lora=None, strategy="ddp", num_ranks=1, kl_weight=0.0, optimizer=None, loss=None, **update):
    options = {"importance_cap": 2.0, "kl_weight": kl_weight, **(loss or {})}
    return LearnerSpec(
        policy=PolicySpec(model=str(model), strategy=strategy, lora=lora, with_reference=kl_weight > 0),
        optimizer=OptimizerSpec(**{"learning_rate": 1e-3, **(optimizer or {})}),
        update=UpdateSpec(loss_options=options, max_tokens=SAMPLING.max_tokens, **update),
        num_ranks=num_ranks,
        num_threads=1,
        timeout=120.0,
    )


def learner(model, **options) -> LearnerCore:
    core = LearnerCore(learner_spec(model, **options), 0)
    core.setup()
    return core


def weights_of(core: LearnerCore) -> np.ndarray:
    return core.weights()[0].view(np.float32).copy()
