"""Which prompts a run keeps, which a step sees, and from which seeds: functions of the step."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thornback.contracts import Anchor, DataError, Prompt, Trajectory
from thornback.train import Trainer, make_config
from thornback.train.prompts import PromptSource, TokenizedPrompt, seed_of
from thornback.train.tokenize import tokenize_prompts


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
    trajectory = Trajectory(*(np.array([1, 2]) for _ in range(4)), "stop")
    anchors = {"p1": Anchor("p1", {}, 0.0, 4, trajectory), "p0": Anchor("p0", {}, 0.5, 4)}
    shard = PromptSource(prompts(2), 0, 2, shuffle=False).batch(0, anchors).shard
    assert shard.trajectories[0] is None
    assert shard.trajectories[1] is trajectory


def test_prompts_too_long_for_the_model_are_named_by_file_and_row(tiny_model, tmp_path, capsys):
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "x" * n, "answer": "1"} for n in (5, 400, 6, 500)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tiny_model("qwen3"))},
        "task": {"name": "math", "options": {"path": str(path)}},
        "data": {"max_prompt_tokens": 100},
        "algorithm": {"estimator": "dvao"},
    }
    trainer = Trainer(values)
    kept, too_long = tokenize_prompts(trainer.config, trainer.problem.task, values["model"]["path"], "train", None)
    assert [p.prompt.extra["source"] for p in kept] == [f"{path}:1", f"{path}:3"]
    assert [line.partition(" (")[0] for line in too_long] == [f"{path}:2", f"{path}:4"]
    config = make_config({**values, "data": {"max_prompt_tokens": 2}})
    with pytest.raises(DataError, match=r"all 4 are longer than 2 tokens, .*mixed\.jsonl:1"):
        tokenize_prompts(config, trainer.problem.task, values["model"]["path"], "train", None)
