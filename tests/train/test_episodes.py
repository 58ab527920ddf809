"""Agents in training: warm start on episodes, rollouts with a tool, anchors, resume; and tools that fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.train.tiny_run import comparable, events
from thornback.contracts import EnvironmentFailed, Observation
from thornback.data import MultihopTask, character_tokenizer, load_tokenizer, read_anchors, read_rollouts
from thornback.train import Trainer
from thornback.train.warm_start import tokenized


def settings(directory: Path, **sections) -> dict:
    values = {
        "run": {"dir": str(directory), "steps": 2, "timeout_seconds": 120, "save_rollouts": True},
        "model": {"build": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}},
        "task": {
            "name": "multihop",
            "options": {"num_people": 12, "min_hops": 1, "max_hops": 2, "top_k": 1, "num_train": 24, "num_test": 24},
        },
        "warm_start": {"steps": 200, "batch_size": 16, "num_demonstrations": 500},
        "data": {"prompts_per_step": 4},
        "rollout": {"max_tokens": 120, "samples_per_prompt": 4, "num_threads": 1},
        "algorithm": {"estimator": "anchored_dvao"},
        "anchors": {"num_rollouts": 4, "drop_solved": False, "drop_unsolved": False},
        "learner": {"learning_rate": 1e-3, "num_threads": 1},
        "evaluation": {"every": 2, "num_prompts": 24, "num_saved_samples": 4},
        "checkpoint": {"every": 1},
    }
    return {name: {**values.get(name, {}), **sections.get(name, {})} for name in {**values, **sections}}


def warmed(first: tuple, directory: Path, **sections) -> dict:
    """The same from the model that the run `first` has warmed up."""
    warm = {"path": str(first[0] / "warm"), "build": None}
    return {**settings(directory, **{"model": warm, **sections}), "warm_start": None}


@pytest.fixture(scope="module")
def run(ray_cluster, tmp_path_factory):
    directory = tmp_path_factory.mktemp("agent") / "run"
    return directory, Trainer(settings(directory)).train()


@pytest.mark.full
def test_its_rollouts_are_episodes(run):
    directory, _ = run
    batch = read_rollouts(str(directory / "rollouts" / "step-000002.parquet"))
    assert len(batch) == 16
    assert batch.num_calls.sum() > 8  # the warm start has taught it to search
    for i in np.flatnonzero(batch.num_calls):
        mask = batch.response(i, "loss_mask")
        assert 0 < mask.mean() < 1
        starts = batch.turn_starts[batch.turn_offsets[i] : batch.turn_offsets[i + 1]]
        assert mask[starts].tolist() == [n % 2 == 0 for n in range(len(starts))]


@pytest.mark.full
def test_its_figures_tell_of_tools(run):
    directory, result = run
    rows = comparable(directory)
    assert all(row["tool_calls"] > 0.5 and row["mismatch/max_abs"] < 1e-3 for row in rows)
    assert result.after["sampled"]["tool_calls"] > 0.5
    assert result.after["sampled"].keys() >= {"reward/answer", "reward/format", "reward/steps"}
    anchors = read_anchors(str(directory / "anchors.parquet"))
    assert anchors.keys() == {p.key for p in MultihopTask(**settings(directory)["task"]["options"]).prompts("train")}


@pytest.mark.full
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, ray_cluster, tmp_path):
    directory, _ = run
    Trainer(warmed(run, tmp_path / "half", run={"steps": 1})).train()
    Trainer(warmed(run, tmp_path / "half")).train()
    assert comparable(tmp_path / "half") == comparable(directory)
    ends = [(path / "model" / "model.safetensors").read_bytes() for path in (directory, tmp_path / "half")]
    assert ends[0] == ends[1]


def test_demonstrations_are_learned_as_rollouts_come():
    """The same tokens between the turns, and a loss on the model's own only."""
    task = MultihopTask(num_people=12, max_hops=2, num_train=24)
    tokenizer = character_tokenizer(task.words)
    demonstrations = task.demonstrations(20)
    for example, shown in zip(tokenized(tokenizer, demonstrations), demonstrations, strict=True):
        answer, mask = np.array(example.token_ids[example.start :]), np.array(example.mask)
        own = [turn for turn in shown.turns if isinstance(turn, str)]
        said = tokenizer.decode(answer[mask == 1].tolist(), skip_special_tokens=True)
        assert said == "".join(own)
        assert (answer[mask == 1] == tokenizer.eos_token_id).sum() == len(own)


@pytest.mark.full
def test_a_task_of_ones_own_gets_a_model_that_speaks_its_words(ray_cluster, tmp_path):
    """Made and warmed up for the task that was handed over, not for one of its name."""
    options = {"num_people": 8, "min_hops": 1, "max_hops": 1, "top_k": 1, "num_train": 8, "num_test": 4}
    task = MultihopTask(**options)
    task.name = "mine"
    values = settings(tmp_path / "run", run={"steps": 1}, warm_start={"steps": 2}, evaluation={"every": 0})
    Trainer({**values, "anchors": None, "algorithm": {"estimator": "dvao"}}, data=task).train()
    assert len(load_tokenizer(tmp_path / "run" / "model")) == len(character_tokenizer(task.words))


class OftenDown(MultihopTask):
    """Its search engine is down for some questions."""

    def environment(self, prompt, seed):
        environment, down = super().environment(prompt, seed), prompt.extra["hops"] == 2

        class Search:
            async def step(self, turn: str) -> Observation:
                if down:
                    raise ConnectionError("search is down")
                return environment.step(turn)

        return Search()


@pytest.mark.full
def test_tools_that_fail_too_often_stop_the_run(run, ray_cluster, tmp_path):
    task = OftenDown(num_people=12, min_hops=1, max_hops=2, top_k=1, num_train=24, num_test=24)
    values = warmed(run, tmp_path / "down", algorithm={"estimator": "dvao"}, evaluation={"every": 0})
    values |= {"anchors": None}
    values["run"]["steps"] = 1
    with pytest.raises(
        EnvironmentFailed, match=r"of 16 rollouts failed in step 1, \d+ of them by ConnectionError: sea"
    ):
        Trainer(values, data=task).train()
    values["run"]["dir"] = str(tmp_path / "allowed")
    Trainer({**values, "environment": {"max_failed_share": 1.0}}, data=task).train()
    said = [event["message"] for event in events(tmp_path / "allowed") if event["kind"] == "environment_failed"]
    assert said
    assert all("rollouts: ConnectionError: search is down" in line for line in said)
    rows = [json.loads(line) for line in (tmp_path / "allowed" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rollout/failed_environments"] > 0
    assert np.isfinite(rows[0]["accuracy"])
