"""The Trainer: a few lines from model, data and reward to a trained model, and a run's directory that says it all."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.train.tiny_run import REWARDS, Lucky, comparable, events, settings, trainer
from thornback import Trainer
from thornback.contracts import ConfigError, RewardError
from thornback.data import read_anchors, read_rollouts
from thornback.train import evaluate, make_config

KEYS = {
    "step",
    "time",
    "version",
    "accuracy",
    "reward/digits/mean",
    "reward/digits/std",
    "reward/vowels/mean",
    "reward/vowels/std",
    "weight/digits",
    "weight/vowels",
    "advantage/abs_mean",
    "advantage/abs_max",
    "advantage/mean_square",
    "advantage/nonzero_groups",
    "loss",
    "grad_norm",
    "clip_fraction",
    "entropy",
    "mismatch/mean_abs",
    "mismatch/max_abs",
    "mismatch/weight_mean",
    "response_length",
    "truncated_fraction",
    "tokens",
    "tokens_per_second",
    "phase/rollout",
    "phase/reward",
    "phase/advantage",
    "phase/update",
    "phase/sync",
    "step_seconds",
    "num_rollouts",
}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(ray_cluster, tiny_model, tmp_path_factory):
    """A finished run with two rollout workers: (directory, result)."""
    directory = tmp_path_factory.mktemp("finished")
    values = settings(
        tiny_model("qwen3"), directory, run={"steps": 4, "save_rollouts": True}, rollout={"num_workers": 2}
    )
    return directory, trainer(values).train()


def test_a_few_lines_train_a_model(ray_cluster, tiny_model, tmp_path):
    def more_digits(completion):
        return sum(c.isdigit() for c in completion.text) / max(len(completion.text), 1)

    short = {
        "run": {"dir": f"file://{tmp_path}", "steps": 12},
        "learner": {"learning_rate": 3e-3},
        "evaluation": {"every": 0},
    }
    short |= {"rollout": {"max_tokens": 16, "num_threads": 1}, "data": {"prompts_per_step": 8}}
    result = Trainer(short, model=tiny_model("qwen3"), data=Lucky(), reward=more_digits).train()
    shares = [row["reward/more_digits/mean"] for row in lines(tmp_path / "metrics.jsonl")]
    assert sum(shares[-3:]) > 1.3 * sum(shares[:3])
    assert AutoModelForCausalLM.from_pretrained(result.model).num_parameters() > 0


def test_every_step_has_every_figure(finished):
    directory, _ = finished
    rows = lines(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row) >= KEYS
        assert row["num_rollouts"] == 16
        assert row["mismatch/mean_abs"] < 1e-4
        assert row["weight/digits"] + row["weight/vowels"] == pytest.approx(1.0, abs=1e-6)
        assert 0 <= row["reward/vowels/mean"] <= 10
    assert "phase/checkpoint" in rows[3]  # of the one after step 3
    assert "kl" not in rows[0]  # without a KL no reference is computed


def test_the_run_directory_is_whole(finished):
    directory, result = finished
    assert (result.steps, result.directory) == (4, str(directory))
    names = {p.name for p in directory.iterdir()}
    expected = (
        "config.yaml metrics.jsonl events.jsonl evaluation.jsonl summary.json report.html checkpoints model tensorboard"
    )
    assert {*expected.split(), "samples_before.parquet", "samples_after.parquet", "rollouts"} == names
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == ["step-3", "step-4"]
    assert yaml.safe_load((directory / "config.yaml").read_text())["run"]["steps"] == 4
    evaluations = lines(directory / "evaluation.jsonl")
    assert [(e["step"], e["mode"]) for e in evaluations] == [(s, m) for s in (0, 4) for m in ("sampled", "greedy")]
    assert {"accuracy", "reward/digits", "reward/vowels", "response_length", "num_prompts"} <= set(evaluations[0])
    assert result.before["sampled"] == evaluations[0]
    assert json.loads((directory / "summary.json").read_text())["after"]["greedy"] == evaluations[3]


def test_samples_before_and_after(finished):
    directory, _ = finished
    before, after = (pq.read_table(directory / f"samples_{when}.parquet").to_pylist() for when in ("before", "after"))
    assert [row["prompt_key"] for row in before] == [row["prompt_key"] for row in after]
    columns = "prompt_key prompt completion answer correct num_tokens reward.digits reward.vowels"
    assert set(before[0]) == set(columns.split())


def test_rollouts_are_kept_with_their_scores(finished):
    directory, _ = finished
    batch = read_rollouts(str(directory / "rollouts" / "step-000002.parquet"))
    row = lines(directory / "metrics.jsonl")[1]
    assert len(batch) == 16
    assert batch.rewards["digits"].mean() == pytest.approx(row["reward/digits/mean"])
    assert (batch.versions == 1).all()


def test_tensorboard_has_the_metrics(finished):
    directory, _ = finished
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    values = [round(point.value, 5) for point in board.Scalars("reward/digits/mean")]
    assert values == [round(row["reward/digits/mean"], 5) for row in lines(directory / "metrics.jsonl")]


def test_a_finished_run_trains_no_further(finished, tiny_model):
    directory, result = finished
    before = comparable(directory)
    values = settings(
        tiny_model("qwen3"), directory, run={"steps": 4, "save_rollouts": True}, rollout={"num_workers": 2}
    )
    started = time.monotonic()
    again = trainer(values).train()
    assert time.monotonic() - started < 2  # no actor starts
    assert (again.steps, again.after) == (4, result.after)
    assert comparable(directory) == before


def test_other_settings_in_the_same_directory_are_refused(finished, tiny_model):
    directory, _ = finished
    values = settings(tiny_model("qwen3"), directory, learner={"learning_rate": 0.5}, rollout={"num_workers": 2})
    with pytest.raises(ConfigError, match=r"other settings \(learner.learning_rate\); take another run.dir"):
        trainer(values).train()


def test_the_finished_model_is_evaluated_by_itself(finished, tiny_model, capsys):
    directory, result = finished
    values = settings(
        tiny_model("qwen3"), directory, run={"steps": 4, "save_rollouts": True}, rollout={"num_workers": 2}
    )
    values["rewards"] = {name: {} for name in REWARDS}
    config = trainer(values).config
    functions = {name: {"function": f"tests.train.tiny_run:{name}"} for name in REWARDS}
    (directory / "config.yaml").unlink()  # the same run, its rewards by import path
    rows = evaluate(make_config({**config.model_dump(), "rewards": functions}))
    for row in rows:
        assert row == {k: v for k, v in result.after[row["mode"]].items() if k != "step"}
    assert "reward/digits" in capsys.readouterr().out


@pytest.mark.full
def test_adapters_a_kl_and_anchors_that_are_estimated_again(ray_cluster, tiny_model, tmp_path):
    values = settings(
        tiny_model("qwen3"),
        tmp_path,
        run={"steps": 4},
        model={"lora": {"rank": 4, "alpha": 8}},
        algorithm={"estimator": "anchored_dvao", "kl_weight": 0.05},
        anchors={"num_rollouts": 3, "drop_unsolved": False, "refresh_every": 2},
        learner={"updates_per_epoch": 2, "epochs_per_batch": 2},
        checkpoint={"every": 2},
    )
    trainer(values).train()
    rows = lines(tmp_path / "metrics.jsonl")
    assert rows[-1]["kl"] > 0
    assert rows[-1]["mismatch/mean_abs"] < 1e-4
    first, second = (read_anchors(str(tmp_path / name)) for name in ("anchors.parquet", "anchors-step-2.parquet"))
    assert first.keys() == second.keys()
    assert first != second
    assert sum(e["kind"] == "anchors" for e in events(tmp_path)) == 3


def fragile(completion):
    """Cannot bear an e."""
    if "e" in completion.text:
        raise ValueError("an e")
    return 0.5


@pytest.mark.full
def test_a_reward_that_fails_at_times_is_counted_and_costs_its_own_judgement(ray_cluster, tiny_model, tmp_path):
    values = settings(
        tiny_model("qwen3"), tmp_path, run={"steps": 1}, scoring={"max_failed_share": 0.95}, evaluation={"every": 0}
    )
    Trainer(values, reward={**REWARDS, "fragile": fragile}).train()
    (row,) = lines(tmp_path / "metrics.jsonl")
    (event,) = (e for e in events(tmp_path) if e["kind"] == "reward_failed")
    assert 0 < row["reward/failed"] < row["num_rollouts"]
    assert event["message"].startswith(f"{row['reward/failed']:.0f} rollouts, first on prompt ")
    assert event["message"].endswith("The reward fragile raised ValueError: an e")
    assert row["reward/fragile/mean"] == 0.5


def test_rewards_in_python_are_tried_before_anything_starts(tiny_model, tmp_path):
    values = settings(tiny_model("qwen3"), tmp_path)
    with pytest.raises(RewardError, match="good"):
        Trainer(values, reward=lambda completion: "good")
    with pytest.raises(ConfigError, match="must be a function"):
        Trainer(values, reward=3)
    with pytest.raises(ConfigError, match="data is a int"):
        Trainer(values, reward=REWARDS, data=3)
    with pytest.raises(ConfigError, match=r"grpo takes one reward, but there are 2"):
        Trainer(settings(tiny_model("qwen3"), tmp_path, algorithm={"estimator": "grpo"}), reward=REWARDS)
    with pytest.raises(ConfigError, match=r"give model.path"):
        Trainer({"run": {"dir": str(tmp_path)}})
