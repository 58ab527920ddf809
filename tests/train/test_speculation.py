"""Speculation in rollouts: the same rollouts, from guesses that are a function of the run's state."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from tests.train.test_survival import MODEL, Driver, killer
from tests.train.tiny_run import comparable, events, settings, trainer
from thornback.data import read_rollouts

# What guesses cost here, so that some are always worth it, on any machine.
COSTS = {"costs": [[1, 1e-3], [256, 1.1e-3]]}


def speculating(model, directory, **sections):
    """A run of three epochs, of answers that often repeat."""
    directory.mkdir(exist_ok=True)
    (directory / "speculation.json").write_text(json.dumps(COSTS))
    rollout = {"speculate": "rasd", "rasd": {"max_sequences": 64}, "temperature": 0.1, "max_tokens": 16}
    values = settings(model, directory, run={"steps": 8, "save_rollouts": True}, **sections)
    values["rollout"] |= rollout | sections.get("rollout", {})
    return values


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tiny_model, tmp_path_factory):
    """A run without trouble: its directory."""
    directory = tmp_path_factory.mktemp("speculating")
    trainer(speculating(tiny_model("qwen3"), directory)).train()
    return directory


def rollouts(directory, step):
    return read_rollouts(str(directory / "rollouts" / f"step-{step:06d}.parquet"))


def test_rollouts_are_those_of_a_plain_run(ray_cluster, undisturbed, tiny_model, tmp_path):
    trainer(speculating(tiny_model("qwen3"), tmp_path, rollout={"speculate": "off"})).train()
    for step in range(1, 9):
        plain, fast = rollouts(tmp_path, step), rollouts(undisturbed, step)
        np.testing.assert_array_equal(fast.response_ids, plain.response_ids)
        np.testing.assert_array_equal(fast.response_offsets, plain.response_offsets)
        np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=1e-3)
    assert not any(key.startswith("rollout/") for row in comparable(tmp_path) for key in row)
    assert not (tmp_path / "checkpoints" / "step-8" / "memory.parquet").exists()


def test_later_epochs_are_guessed_from_earlier_ones(undisturbed):
    rows = comparable(undisturbed)
    for row in rows[3:]:  # three steps are an epoch
        assert row["rollout/drafts"] > 0
        assert row["rollout/accepted_per_draft"] > 0
        assert row["rollout/failed_drafts"] == 0


@pytest.mark.full
def test_guesses_start_from_the_reference_rollouts(ray_cluster, tiny_model, tmp_path):
    anchors = {"num_rollouts": 3, "drop_solved": False, "drop_unsolved": False}

    def run(directory, **more):
        values = speculating(tiny_model("qwen3"), directory, anchors={**anchors, **more})
        values["run"]["steps"] = 1
        trainer(values).train()
        messages = [e["message"] for e in events(directory) if e["kind"] == "speculation"]
        return comparable(directory)[0]["rollout/accepted_share"], messages

    with_some, (message,) = run(tmp_path / "with")
    assert len(read_rollouts(str(tmp_path / "with" / "reference_rollouts"))) == 3 * 12
    assert "are guessed from" in message
    assert message.endswith("/with/reference_rollouts")
    without, (message,) = run(tmp_path / "without", path=str(tmp_path / "with" / "anchors.parquet"))
    assert "nothing at first" in message
    assert with_some > without


@pytest.mark.full
def test_actors_that_are_killed_change_nothing(ray_cluster, undisturbed, tiny_model, tmp_path):
    """A new worker recalls what the lost one had seen; after a lost learner, workers forget the steps taken back."""
    thread = killer(tmp_path, [(4, "rollout worker"), (5, "learner rank")])
    trainer(speculating(tiny_model("qwen3"), tmp_path)).train()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert any("going on after step" in e["message"] for e in events(tmp_path) if e["kind"] == "resumed")
    assert comparable(tmp_path) == comparable(undisturbed)
    assert (tmp_path / MODEL).read_bytes() == (undisturbed / MODEL).read_bytes()


@pytest.mark.full
def test_a_driver_that_is_killed_changes_nothing(ray_cluster, undisturbed, tiny_model, tmp_path):
    directory = tmp_path / "run"

    def start():
        return Driver(directory, speculating(tiny_model("qwen3"), directory), ray_cluster)

    assert start().signal_after(5, signal.SIGKILL) == -signal.SIGKILL
    start().finish()
    assert any("going on after step 3" in e["message"] for e in events(directory) if e["kind"] == "resumed")
    assert comparable(directory) == comparable(undisturbed)
    assert (directory / MODEL).read_bytes() == (undisturbed / MODEL).read_bytes()
    assert rollouts(directory, 8).logprobs.tobytes() == rollouts(undisturbed, 8).logprobs.tobytes()
