"""Speculation in rollouts: the same rollouts, from guesses that are a function of the run's state."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from tests.train.test_survival import MODEL, Driver, killer
from tests.train.tiny_run import comparable, events, settings, trainer
from thornback.contracts import ModelError
from thornback.data import read_rollouts
from thornback.engine import load_model
from thornback.engine.draft_head import DraftHead

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


@pytest.fixture(scope="module")
def head(tiny_model, tmp_path_factory) -> str:
    """The directory of an untrained head for the runs' starting model."""
    directory = tmp_path_factory.mktemp("head")
    DraftHead.new(load_model(tiny_model("qwen3"))).save(directory)
    return str(directory)


def drafted(model, directory, head, **sections):
    """A speculating run whose draft head follows the policy; checkpoints lie between two refreshes."""
    rasd = {"draft": head, "draft_refresh_every": 2, "draft_refresh_updates": 4, "draft_learning_rate": 5e-3}
    return speculating(model, directory, rollout={"rasd": {"max_sequences": 64, **rasd}}, **sections)


@pytest.fixture(scope="module")
def followed(ray_cluster, tiny_model, head, tmp_path_factory):
    """A run with a head that is refreshed, without trouble: its directory."""
    directory = tmp_path_factory.mktemp("followed")
    trainer(drafted(tiny_model("qwen3"), directory, head)).train()
    return directory


@pytest.mark.full
def test_a_head_that_follows_the_policy_changes_no_token(ray_cluster, undisturbed, followed):
    for step in range(1, 9):
        plain, fast = rollouts(undisturbed, step), rollouts(followed, step)
        np.testing.assert_array_equal(fast.response_ids, plain.response_ids)
        np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=1e-3)
    rows = comparable(followed)
    agreement = {row["step"]: row["rollout/draft_agreement"] for row in rows if "rollout/draft_agreement" in row}
    assert list(agreement) == [2, 4, 6, 8]
    assert agreement[8] > agreement[2]  # though the policy has moved
    assert all(row["rollout/failed_drafts"] == 0 for row in rows)
    first = comparable(undisturbed)[0]
    assert rows[0]["rollout/draft_tokens"] > first["rollout/draft_tokens"]
    # Rollouts of the last steps are in a checkpoint only where the head has not learned from them yet.
    assert (followed / "checkpoints" / "step-6" / "draft.safetensors").exists()
    assert not (followed / "checkpoints" / "step-6" / "draft_rollouts.parquet").exists()


@pytest.mark.full
def test_a_head_survives_all_that_is_killed(ray_cluster, followed, tiny_model, head, tmp_path):
    """A lost draft learner costs the work in hand; new workers get the present head; a run that goes back to a
    checkpoint goes back to its head, too."""
    thread = killer(tmp_path, [(1, "draft learner"), (4, "rollout worker"), (5, "learner rank"), (5, "draft learner")])
    trainer(drafted(tiny_model("qwen3"), tmp_path, head)).train()
    thread.join(timeout=5)
    assert not thread.is_alive()
    lost = [e["message"] for e in events(tmp_path) if e["kind"] == "actor_lost"]
    assert any("while refreshing the draft head of step" in message for message in lost)
    assert any("going on after step 3" in e["message"] for e in events(tmp_path) if e["kind"] == "resumed")
    assert comparable(tmp_path) == comparable(followed)
    assert (tmp_path / MODEL).read_bytes() == (followed / MODEL).read_bytes()


@pytest.mark.full
def test_a_head_survives_its_driver(ray_cluster, followed, tiny_model, head, tmp_path):
    directory = tmp_path / "run"

    def start():
        return Driver(directory, drafted(tiny_model("qwen3"), directory, head), ray_cluster)

    assert start().signal_after(5, signal.SIGKILL) == -signal.SIGKILL
    assert (directory / "checkpoints" / "step-3" / "draft_rollouts.parquet").exists()
    start().finish()
    assert any("going on after step 3" in e["message"] for e in events(directory) if e["kind"] == "resumed")
    assert comparable(directory) == comparable(followed)
    assert (directory / MODEL).read_bytes() == (followed / MODEL).read_bytes()
    heads = [run / "checkpoints" / "step-8" / "draft.safetensors" for run in (directory, followed)]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    assert rollouts(directory, 8).logprobs.tobytes() == rollouts(followed, 8).logprobs.tobytes()


def test_a_head_of_another_model_is_refused(tiny_model, head, tmp_path):
    """Before anything starts: there is no Ray here."""
    with pytest.raises(ModelError, match="made for another model: its hidden_size is 64, but the model's is 32"):
        trainer(drafted(tiny_model("qwen3", hidden_size=32), tmp_path / "a", head))
    with pytest.raises(ModelError, match=r"has no readable config\.json"):
        trainer(drafted(tiny_model("qwen3"), tmp_path / "b", str(tmp_path / "nothing")))
    with pytest.raises(ModelError, match="holds a whole model"):
        trainer(drafted(tiny_model("qwen3"), tmp_path / "d", str(tiny_model("qwen3"))))
    built = drafted(tiny_model("qwen3"), tmp_path / "c", head)
    built["model"] = {"build": {"hidden_size": 96}}
    with pytest.raises(ModelError, match="its hidden_size is 64, but the model's is 96"):
        trainer(built)
