"""Ranks in real actors: two do what one does, sharded or not; what one raises, or its death, is told at once."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import ray

from tests.actors.batches import advantages, learner, learner_spec, rollouts, weights_of
from thornback.actors import LearnerGroup, LearnerLost
from thornback.contracts import ModelError


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def batch(model):
    return rollouts(model)


@pytest.fixture(scope="module")
def alone(model, batch):
    """One rank, in this process: weights and metrics after two updates."""
    core, values = learner(model, optimizer={"weight_decay": 0.01}), advantages(batch)
    core.update(0, values, batch)
    report = core.update(1, values, batch)
    return weights_of(core), report.metrics


@pytest.fixture(scope="module")
def start(ray_cluster):
    """`start(spec)` starts a group; `start(spec, used=True)` takes the last one if it is of this spec. Only the last
    group runs on."""
    groups = []

    def start(spec, used=False):
        if not (used and groups and groups[-1].spec == spec):
            for group in groups:
                group.shutdown()
            groups.append(LearnerGroup(spec))
            groups[-1].start()
        return groups[-1]

    yield start
    for group in groups:
        group.shutdown()


def published(group):
    returns = [rank.weights.remote() for rank in group.ranks]
    others = [ray.get(buffer) for buffer, _ in returns[1:]]
    assert others == [None] * len(others)  # one copy of the weights, not one a rank
    return ray.get(returns[0][0]).view(np.float32)


def two_updates(group, batch):
    half = len(batch) // 2
    table = batch.to_arrow()
    pieces = [ray.put(type(batch).from_arrow(t)) for t in (table.slice(0, half), table.slice(half))]
    values = advantages(batch)
    group.update(0, values, pieces)
    return group.update(1, values, pieces)


def pair(model, strategy="ddp"):
    return learner_spec(
        model, strategy=strategy, num_ranks=2, tokens_per_microbatch=100, optimizer={"weight_decay": 0.01}
    )


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.full)])
def test_two_ranks_do_what_one_does(model, batch, alone, start, strategy, tmp_path):
    group = start(pair(model, strategy))
    report = two_updates(group, batch)
    np.testing.assert_allclose(published(group), alone[0], atol=4e-5)  # two steps of AdamW at lr 1e-3
    assert report.metrics == pytest.approx(alone[1], rel=2e-3, abs=1e-5)
    group.save(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == (1 if strategy == "ddp" else 2)
    before = published(group).copy()
    two_updates(group, batch)
    assert (published(group) != before).any()
    group.restore(str(tmp_path))
    np.testing.assert_array_equal(published(group), before)


def test_a_dead_rank_takes_the_group_down_by_name(model, batch, start):
    group = start(pair(model), used=True)
    pid = group.homes[1].pid
    os.kill(pid, 9)
    with pytest.raises(
        LearnerLost, match=rf"learner rank 1 \(process {pid} on node .*\) died while updating at step 0"
    ):
        two_updates(group, batch)
    group.start()
    assert two_updates(group, batch).num_steps == 1


def test_a_model_that_is_none_is_told_at_once(start, tmp_path):
    started = time.monotonic()
    with pytest.raises(ModelError, match="is not a directory"):
        start(learner_spec(tmp_path / "nothing"))
    assert time.monotonic() - started < 60
