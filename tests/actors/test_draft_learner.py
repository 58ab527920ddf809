"""A draft head follows a policy that moves, and what it learns is a function of what it is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.actors.batches import SAMPLING, SHARD, worker
from thornback.actors import DraftLearnerSpec, RolloutSpec
from thornback.actors.draft_learner import DraftLearnerCore
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.contracts import DataError, EngineConfig, ModelError, Request, SpeculationConfig, WeightView
from thornback.engine import bind_weights, copy_parameters, load_model
from thornback.engine.draft_head import DraftHead, load_draft_head

COSTS = ((1, 1e-3), (256, 1.1e-3))  # a pass of any size costs the same: every guess is worth it
LONG = replace(SAMPLING, max_tokens=32, n=8, temperature=0.3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def draft(model, tmp_path_factory) -> str:
    """The directory of an untrained head."""
    directory = tmp_path_factory.mktemp("head")
    DraftHead.new(load_model(model)).save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def moved(model) -> WeightView:
    """The weights of a policy that has gone some way from the model."""
    policy, rng = copy_parameters(load_model(model)), np.random.default_rng(1)
    for _, weight in policy:
        weight += rng.normal(0, 0.3 * weight.std(), weight.shape).astype(np.float32)
    return policy


@pytest.fixture(scope="module")
def batches(model, moved):
    """Three batches of the moved policy's rollouts."""
    core = worker(model)
    core.load_weights(moved.buffer, moved.index, 1)
    shards = [replace(SHARD, seeds=tuple(seed + 1000 * i for seed in SHARD.seeds)) for i in range(3)]
    return [core.generate(shard, LONG, 1)[0] for shard in shards]


def learner(model, draft, **options) -> DraftLearnerCore:
    core = DraftLearnerCore(DraftLearnerSpec(model=str(model), draft=draft, num_threads=1, **options))
    core.setup()
    return core


def test_a_head_follows_the_policy(model, draft, moved, batches) -> None:
    """What it learns of some rollouts it knows of others; one that stays as it is does not."""
    core = learner(model, draft, updates=30, learning_rate=5e-3)
    weights, _, moments, _, _ = core.restore(None)
    policy, (*learned, others) = (moved.buffer, moved.index), batches
    new, new_moments, report = core.refresh(1, 0, weights, moments, *policy, *learned)
    assert (report.num_updates, report.num_rollouts) == (30, 64)
    stale = core.refresh(2, 0, weights, moments, *policy, others)[2].agreement
    fresh = core.refresh(2, 30, new, new_moments, *policy, others)[2].agreement
    assert fresh > stale + 0.2


def test_the_same_state_learns_the_same(model, draft, moved, batches, tmp_path) -> None:
    """In another actor, too, that has read it from a checkpoint; a learner keeps nothing between two calls."""
    policy = (moved.buffer, moved.index)
    core = learner(model, draft, updates=3)
    weights, index, moments, rollouts, report = core.restore(None)
    assert rollouts is None
    assert report.num_updates == 0
    weights, moments, _ = core.refresh(1, 0, weights, moments, *policy, batches[0])
    first = core.refresh(2, 3, weights, moments, *policy, *batches[1:])
    again = core.refresh(2, 3, weights, moments, *policy, *batches[1:])
    core.save(str(tmp_path), 3, weights, moments, *batches[1:])
    other = learner(model, draft, updates=3)
    weights, restored_index, moments, rollouts, report = other.restore(str(tmp_path))
    assert restored_index == index
    assert report.num_updates == 3
    assert report.num_rollouts == 64
    restored = other.refresh(2, 3, weights, moments, *policy, rollouts)
    for found in (again, restored):
        assert [x.tobytes() for x in found[:2]] == [x.tobytes() for x in first[:2]]
        assert found[2] == first[2]
    assert first[0].tobytes() != weights.tobytes()
    assert other.restore(None)[0].tobytes() == core.restore(None)[0].tobytes()


def test_of_many_rollouts_the_newest_are_learned_from(model, draft, moved, batches) -> None:
    lengths = [len(batches[2].prompt(i)) + len(batches[2].response(i)) for i in range(len(batches[2]))]
    core = learner(model, draft, updates=1, max_tokens=sum(lengths) + lengths[-1] - 1)
    weights, _, moments, _, _ = core.restore(None)
    policy = (moved.buffer, moved.index)
    all_of_them = core.refresh(1, 0, weights, moments, *policy, *batches)
    the_last = core.refresh(1, 0, weights, moments, *policy, batches[2])
    assert all_of_them[2] == the_last[2]
    assert all_of_them[0].tobytes() == the_last[0].tobytes()
    assert core.refresh(1, 0, weights, moments, *policy)[2].num_updates == 0


def test_the_state_of_another_head_is_refused(model, draft, tmp_path) -> None:
    core = learner(model, draft)
    weights, _, moments, _, _ = core.restore(None)
    core.save(str(tmp_path), 0, weights, moments)
    DraftHead.new(load_model(model), intermediate_size=64).save(tmp_path / "narrow")
    with pytest.raises(DataError, match="another draft head than"):
        learner(model, str(tmp_path / "narrow")).restore(str(tmp_path))


def guessing(model, draft: str) -> RolloutWorkerCore:
    speculation = SpeculationConfig(num_nodes=16, draft=draft, draft_depth=4, draft_top_k=3)
    core = RolloutWorkerCore(
        RolloutSpec(
            str(model), engine_config=EngineConfig(speculation=speculation), num_threads=1, memory_tokens=1 << 20
        )
    )
    core.setup()
    core.recall(COSTS, None)
    return core


def test_workers_guess_by_the_head_that_they_are_given(model, draft, moved, batches, tmp_path) -> None:
    """As by one that is read from a directory; and whichever it is, tokens are those of plain decoding."""
    core = learner(model, draft, updates=30, learning_rate=5e-3)
    weights, index, moments, _, _ = core.restore(None)
    weights, _, _ = core.refresh(1, 0, weights, moments, moved.buffer, moved.index, *batches[1:])
    head = load_draft_head(draft, load_model(model), 0)
    bind_weights(head, WeightView(weights, index))
    head.save(tmp_path / "head")

    def rollouts_of(directory: str, *given):
        guesser = guessing(model, directory)
        guesser.load_weights(moved.buffer, moved.index, 1)
        if given:
            guesser.generate(SHARD, LONG, 1)  # so that it has read something with its parameters of before
            guesser.load_draft(*given)
        return guesser.generate(SHARD, LONG, 1)

    given, report = rollouts_of(draft, weights, index)
    read, expected = rollouts_of(str(tmp_path / "head"))
    assert given.logprobs.tobytes() == read.logprobs.tobytes()
    assert report.speculation == expected.speculation
    np.testing.assert_array_equal(given.response_ids, batches[0].response_ids)


def test_an_engine_takes_a_head_only_where_it_has_one_and_is_idle(model, draft) -> None:
    weights, index, *_ = learner(model, draft).restore(None)
    with pytest.raises(ModelError, match="has no draft head"):
        worker(model).load_draft(weights, index)
    core = guessing(model, draft)
    core.engine.add_request(Request("a", SHARD.token_ids[0], LONG))
    with pytest.raises(RuntimeError, match="unfinished"):
        core.load_draft(weights, index)
