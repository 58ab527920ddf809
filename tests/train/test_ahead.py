"""Rollouts that run ahead of the learner: bounded, none lost, none trained twice, whatever dies."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.train.test_survival import Driver, killer
from tests.train.tiny_run import REWARDS, events, settings, trainer
from thornback.contracts import Completion, ConfigError, Observation, Prompt, RolloutBatch
from thornback.data import read_rollouts
from thornback.train import Trainer

STEPS = 9  # of 4 prompts: three epochs of 12


def running_ahead(model, directory: Path, **rollout) -> dict:
    directory.mkdir(exist_ok=True)
    sections = {"run": {"steps": STEPS, "save_rollouts": True}, "evaluation": {"every": 4}}
    return settings(model, directory, rollout={"max_staleness": 1, "num_workers": 2, **rollout}, **sections)


def trained(directory: Path) -> list[RolloutBatch]:
    """By step."""
    return [read_rollouts(str(directory / "rollouts" / f"step-{step:06d}.parquet")) for step in range(1, STEPS + 1)]


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def check(directory: Path, bound: int = 1) -> None:
    """Each prompt was trained once an epoch, its group whole; nothing by weights older than the bound allows."""
    batches = trained(directory)
    keys = Counter(key for batch in batches for key in batch.prompt_keys[batch.sample_index == 0])
    assert len(keys) == 12
    assert set(keys.values()) == {3}
    for step, batch in enumerate(batches):
        assert len(batch) == 16
        assert batch.sample_index.tolist() == [0, 1, 2, 3] * 4
        assert batch.versions.min() >= step - bound
        assert batch.versions.max() <= step


def test_each_prompt_is_trained_once_an_epoch_within_the_bound(ray_cluster, tiny_model, tmp_path):
    values = running_ahead(tiny_model("qwen3"), tmp_path, num_workers=1)
    values["run"]["address"] = ray_cluster.get_runtime_context().gcs_address
    result = trainer(values).train()
    assert result.steps == STEPS
    check(tmp_path)
    rows = metrics(tmp_path)
    assert all(row["ahead/staleness_max"] <= 1 for row in rows)
    assert any(row["ahead/staleness_max"] == 1 for row in rows), "nothing ran ahead"
    counts = [sum(v for k, v in row.items() if k in ("ahead/staleness_0", "ahead/staleness_1")) for row in rows]
    assert counts == [16] * STEPS


def test_guessed_rollouts_do_not_run_ahead(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="are not guessed"):
        trainer(running_ahead(tiny_model("qwen3"), tmp_path, speculate="rasd"))


@pytest.mark.full
def test_a_run_goes_on_without_the_worker_that_has_no_place(ray_cluster, tiny_model, tmp_path):
    trainer(running_ahead(tiny_model("qwen3"), tmp_path, num_cpus=3)).train()  # of the cluster's four
    check(tmp_path)
    started = [e["message"] for e in events(tmp_path) if e["kind"] == "actor_started"]
    assert sum(message.startswith("rollout worker") for message in started) == 1


@pytest.mark.full
def test_workers_judges_and_learners_that_are_killed_lose_nothing(ray_cluster, tiny_model, tmp_path):
    values = running_ahead(tiny_model("qwen3"), tmp_path, max_staleness=2, ahead={"seconds": 0.05})
    thread = killer(tmp_path, [(2, "rollout worker"), (4, "reward model"), (5, "learner rank"), (6, "rollout worker")])
    trainer(values).train()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert any(e["kind"] == "resumed" for e in events(tmp_path))
    check(tmp_path, bound=2)


@pytest.mark.full
def test_a_driver_that_is_killed_goes_on_where_it_was(ray_cluster, tiny_model, tmp_path):
    directory = tmp_path / "run"

    def start() -> Driver:
        return Driver(directory, running_ahead(tiny_model("qwen3"), directory, max_staleness=2), ray_cluster)

    assert start().signal_after(2, signal.SIGTERM) != 0
    assert start().signal_after(6, signal.SIGKILL) == -signal.SIGKILL
    start().finish()
    check(directory, bound=2)


class SlowTool:
    """An environment that takes its time on one prompt: what the others wait for, or not."""

    name, system_prompt, max_turns, rewards = "slow", None, 2, ()

    def prompts(self, split: str):
        for i in range(12):
            yield Prompt(f"{split}/{i}", ({"role": "user", "content": f"{i}"},), "x")

    def is_correct(self, completion: Completion) -> bool:
        return completion.num_calls > 0

    def environment(self, prompt: Prompt, seed: int) -> SlowTool.Side:
        return SlowTool.Side(prompt)

    class Side:
        def __init__(self, prompt: Prompt) -> None:
            self.turns, self.slow = 0, prompt.key.endswith("/3")

        async def step(self, turn: str) -> Observation:
            self.turns += 1
            await asyncio.sleep(3.0 if self.slow else 0.0)
            return Observation(({"role": "tool", "content": "go on"},), 1) if self.turns == 1 else Observation()


@pytest.mark.full
@pytest.mark.parametrize("late", ["drop", "correct"])
def test_late_groups_are_dropped_or_trained_late_and_unfinished_ones_take_new_weights(
    ray_cluster, tiny_model, tmp_path, late
):
    values = running_ahead(tiny_model("qwen3"), tmp_path, max_staleness=2, ahead={"late": late, "seconds": 0.05})
    values["task"] = {"name": "tests.train.test_ahead:SlowTool"}
    values["rollout"] |= {"max_tokens": 80, "num_workers": 1}
    values["evaluation"] = {"every": 0}
    Trainer(values, reward=REWARDS).train()
    rows = metrics(tmp_path)
    batches = trained(tmp_path)
    if late == "drop":
        assert sum(row["ahead/late_groups"] for row in rows) > 0
        assert all(row["ahead/staleness_max"] <= 2 for row in rows)
    else:
        assert sum(row["ahead/late_groups"] for row in rows) == 0
        assert max(row["ahead/staleness_max"] for row in rows) > 2
    versions = [np.unique(batch.response(i, "versions")) for batch in batches for i in range(len(batch))]
    assert max(map(len, versions)) > 1, "no second turn was drawn by newer weights"
