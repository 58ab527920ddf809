"""Rollout workers: a shard's rollouts are a function of the weights and the shard."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.actors.batches import SAMPLING, SHARD, learner, worker
from thornback.actors import PromptShard, RolloutSpec
from thornback.actors.engines import make_engine
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import CACHED_VERSION, ConfigError, EngineConfig, ThornbackError, Trajectory


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


def same(a, b):
    for name in ("response_ids", "response_offsets", "logprobs", "versions", "finish_reason", "prompt_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_the_same_shard_gives_the_same_rollouts_bit_for_bit(model):
    core = worker(model)
    first, report = core.generate(SHARD, SAMPLING, 0)
    core.generate(replace(SHARD, seeds=(1, 2, 3, 4)), SAMPLING, 0)  # leaves a cache behind
    same(core.generate(SHARD, SAMPLING, 0)[0], first)
    same(worker(model).generate(SHARD, SAMPLING, 0)[0], first)
    assert report.num_tokens == len(first.response_ids)
    assert first.sample_index.tolist() == [0, 1, 2, 3] * 4
    assert first.prompt_keys.tolist() == ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["d"] * 4


def test_seeds_tell_rollouts_apart(model):
    batch, _ = worker(model).generate(
        PromptShard(("a", "b"), (SHARD.token_ids[0],) * 2, (100, 101)), replace(SAMPLING, n=3), 0
    )
    np.testing.assert_array_equal(batch.response(1), batch.response(3))  # seed 100 + 1 = 101 + 0
    assert len({batch.response(i).tobytes() for i in range(3)}) == 3


def test_other_weights_than_asked_for_are_an_error(model):
    core = worker(model)
    core.load_weights(*learner(model).weights(), 3)
    assert (core.generate(SHARD, SAMPLING, 3)[0].versions == 3).all()
    with pytest.raises(ThornbackError, match="holds weights of version 3, but was asked for version 2"):
        core.generate(SHARD, SAMPLING, 2)


def test_a_trajectory_alone_needs_no_sampling(model):
    cached = Trajectory(
        *(np.array(values, np.int32) for values in ([5, 6], [-1, -2], [CACHED_VERSION] * 2, [1, 1])), "stop"
    )
    shard = PromptShard(("a",), (SHARD.token_ids[0],), (7,), (cached,))
    batch, report = worker(model).generate(shard, replace(SAMPLING, n=1), 0)
    assert report.num_tokens == 0
    assert batch.response(0).tolist() == [5, 6]


def test_engines_by_name(model):
    with pytest.raises(ConfigError, match="There is no engine nonsense; take one of torch"):
        make_engine("nonsense", str(model), EngineConfig())
    with pytest.raises(ConfigError, match="cannot be imported"):
        make_engine("no.such:engine", str(model), EngineConfig())
    core = RolloutWorkerCore(RolloutSpec(str(model), engine="thornback.engine:TorchEngine", num_threads=1))
    core.setup()
    same(core.generate(SHARD, SAMPLING, 0)[0], worker(model).generate(SHARD, SAMPLING, 0)[0])
