"""Speculation in rollouts: the same rollouts, from guesses that are a function of the run's state."""

from __future__ import annotations

import numpy as np
import pytest

from tests.train.tiny_run import comparable, drafted, events, speculating, trainer
from thornback.contracts import ModelError
from thornback.data import read_rollouts


@pytest.fixture(scope="module")
def remembering(ray_cluster, tiny_model, tmp_path_factory):
    """The directory of a run that guesses from what it saw, without a draft head."""
    directory = tmp_path_factory.mktemp("remembering")
    trainer(speculating(tiny_model("qwen3"), directory)).train()
    return directory


def rollouts(directory, step):
    return read_rollouts(str(directory / "rollouts" / f"step-{step:06d}.parquet"))


@pytest.mark.full
def test_rollouts_are_those_of_a_plain_run(ray_cluster, remembering, undisturbed, tiny_model, tmp_path):
    trainer(speculating(tiny_model("qwen3"), tmp_path, rollout={"speculate": "off"})).train()
    for fast_run in (remembering, undisturbed):
        for step in range(1, 9):
            plain, fast = rollouts(tmp_path, step), rollouts(fast_run, step)
            np.testing.assert_array_equal(fast.response_ids, plain.response_ids)
            np.testing.assert_array_equal(fast.response_offsets, plain.response_offsets)
            np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=1e-3)
    assert not any(key.startswith("rollout/") for row in comparable(tmp_path) for key in row)
    assert not (tmp_path / "checkpoints" / "step-8" / "memory.parquet").exists()


@pytest.mark.full
def test_later_epochs_are_guessed_from_earlier_ones(remembering):
    rows = comparable(remembering)
    for row in rows[3:]:  # three steps are an epoch
        assert row["rollout/drafts"] > 0
        assert row["rollout/accepted_per_draft"] > 0
        assert row["rollout/failed_drafts"] == 0


@pytest.mark.full
def test_guesses_start_from_the_reference_rollouts(ray_cluster, remembering, tiny_model, tmp_path):
    anchors = {"num_rollouts": 3, "drop_solved": False, "drop_unsolved": False}
    values = speculating(tiny_model("qwen3"), tmp_path, anchors=anchors)
    values["run"]["steps"] = 1
    trainer(values).train()
    (message,) = (e["message"] for e in events(tmp_path) if e["kind"] == "speculation")
    assert len(read_rollouts(str(tmp_path / "reference_rollouts"))) == 3 * 12
    assert "are guessed from" in message
    assert message.endswith(f"{tmp_path.name}/reference_rollouts")
    (message,) = (e["message"] for e in events(remembering) if e["kind"] == "speculation")
    assert "nothing at first" in message
    with_some, without = (comparable(run)[0]["rollout/accepted_share"] for run in (tmp_path, remembering))
    assert with_some > without


@pytest.mark.full
def test_a_head_follows_the_policy(remembering, undisturbed):
    rows = comparable(undisturbed)
    agreement = {row["step"]: row["rollout/draft_agreement"] for row in rows if "rollout/draft_agreement" in row}
    assert list(agreement) == [2, 4, 6, 8]
    assert agreement[8] > agreement[2]  # though the policy has moved
    assert all(row["rollout/failed_drafts"] == 0 for row in rows)
    assert rows[0]["rollout/draft_tokens"] > comparable(remembering)[0]["rollout/draft_tokens"]
    # Rollouts of the last steps are in a checkpoint only where the head has not learned from them yet.
    assert (undisturbed / "checkpoints" / "step-6" / "draft.safetensors").exists()
    assert not (undisturbed / "checkpoints" / "step-6" / "draft_rollouts.parquet").exists()


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
