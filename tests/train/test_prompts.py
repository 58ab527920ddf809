"""Which prompts a step sees, and from which seeds: functions of the step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thornback.contracts import Anchor, Prompt
from thornback.train.prompts import PromptSource, TokenizedPrompt, seed_of


def prompts(count):
    return [TokenizedPrompt(Prompt(f"p{i}", ({"role": "user", "content": str(i)},)), (1, i)) for i in range(count)]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_every_epoch_has_every_prompt_once(count, per_step, seed):
    source = PromptSource(prompts(count), seed, per_step)
    steps = -(-3 * count // per_step)
    keys = [key for step in range(steps) for key in source.batch(step).shard.keys]
    for epoch in range(3):
        assert sorted(keys[epoch * count : (epoch + 1) * count]) == sorted(f"p{i}" for i in range(count))


def test_a_step_is_the_same_whatever_came_before():
    source = PromptSource(prompts(10), 3, 4)
    batches = [source.batch(step) for step in range(8)]
    for step in (7, 0, 5, 2):
        assert PromptSource(prompts(10), 3, 4).batch(step) == batches[step]
        assert source.batch(step) == batches[step]
    assert PromptSource(prompts(10), 4, 4).batch(0).shard != batches[0].shard
    assert [batches[0].shard.keys, batches[1].shard.keys] != [batches[5].shard.keys, batches[6].shard.keys]


def test_a_prompt_is_answered_anew_each_epoch():
    source = PromptSource(prompts(3), 0, 3, shuffle=False)
    first, second = source.batch(0).shard, source.batch(1).shard
    assert first.keys == second.keys == ("p0", "p1", "p2")
    assert not set(first.seeds) & set(second.seeds)


def test_seeds_are_the_same_on_any_machine_and_far_apart():
    assert seed_of(0, "train", "p0", 0) == 4444323142483959297
    seeds = sorted(seed_of(run, "train", f"p{i}", epoch) for run in range(3) for i in range(100) for epoch in range(3))
    assert seeds[0] >= 0
    assert seeds[-1] < 2**62
    assert min(np.diff(seeds)) > 10**6  # sample i adds i


@given(st.integers(1, 20), st.integers(1, 8))
def test_pieces_are_contiguous_and_even(count, workers):
    batch = PromptSource(prompts(count), 0, count).batch(0)
    pieces = batch.split(workers)
    assert len(pieces) == min(count, workers)
    assert tuple(k for p in pieces for k in p.shard.keys) == batch.shard.keys
    assert tuple(s for p in pieces for s in p.shard.seeds) == batch.shard.seeds
    sizes = [len(p.prompts) for p in pieces]
    assert max(sizes) - min(sizes) <= 1


def test_cached_trajectories_come_along():
    trajectory, logprobs = np.array([1, 2]), np.array([-1.0, -2.0])
    anchors = {"p1": Anchor("p1", {}, 0.0, 4, trajectory, logprobs), "p0": Anchor("p0", {}, 0.5, 4)}
    shard = PromptSource(prompts(2), 0, 2, shuffle=False).batch(0, anchors).shard
    assert shard.trajectories[0] is None
    assert shard.trajectories[1] == (trajectory, logprobs)
