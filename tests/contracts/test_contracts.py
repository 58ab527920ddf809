"""The nouns that cross rooms: a batch and its Parquet file are the same thing; bad parameters are named."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

from thornback.contracts import (
    CACHED_VERSION,
    FINISH_REASONS,
    Anchor,
    InvalidRequest,
    RolloutBatch,
    SamplingParams,
    Trajectory,
    WeightView,
    anchors_from_arrow,
    anchors_to_arrow,
    offsets_of,
    weight_index,
)


@st.composite
def batches(draw) -> RolloutBatch:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 6))
    prompts, responses, turns = (rng.integers(0, 5, count) for _ in range(3))
    total = int(responses.sum())
    return RolloutBatch(
        prompt_ids=rng.integers(0, 99, int(prompts.sum()), dtype=np.int32),
        prompt_offsets=offsets_of(prompts),
        response_ids=rng.integers(0, 99, total, dtype=np.int32),
        response_offsets=offsets_of(responses),
        logprobs=-rng.random(total, dtype=np.float32),
        versions=rng.integers(0, 9, total, dtype=np.int32),
        loss_mask=rng.integers(0, 2, total, dtype=np.uint8),
        turn_starts=rng.integers(0, 9, int(turns.sum()), dtype=np.int32),
        turn_offsets=offsets_of(turns),
        prompt_keys=np.array([f"käse/{i}" for i in range(count)], dtype=np.str_),
        sample_index=np.arange(count, dtype=np.int32),
        finish_reason=rng.integers(0, len(FINISH_REASONS), count).astype(np.int8),
        num_calls=rng.integers(0, 5, count, dtype=np.int32),
        correct=rng.integers(0, 2, count).astype(np.float32),
        rewards={"a": rng.random(count, dtype=np.float32), "b.c": np.full(count, np.nan, np.float32)},
        judged={"d": rng.random(count, dtype=np.float32)},
    )


def assert_equal(a: RolloutBatch, b: RolloutBatch) -> None:
    for name in RolloutBatch.__dataclass_fields__:
        if name not in ("rewards", "judged"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
            if name != "prompt_keys":
                assert getattr(a, name).dtype == getattr(b, name).dtype, name
    for ours, theirs in ((a.rewards, b.rewards), (a.judged, b.judged)):
        assert list(ours) == list(theirs)
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])


@settings(max_examples=60, deadline=None)
@given(batches(), batches())
def test_arrow_and_concatenation(a: RolloutBatch, b: RolloutBatch) -> None:
    both = RolloutBatch.concat([a, b])
    assert len(both) == len(a) + len(b)
    table = both.to_arrow()
    assert_equal(RolloutBatch.from_arrow(table), both)
    assert_equal(RolloutBatch.from_arrow(table.slice(0, len(a))), a)
    assert_equal(RolloutBatch.from_arrow(table.slice(len(a))), b)
    for i in range(len(b)):
        np.testing.assert_array_equal(both.prompt(len(a) + i), b.prompt(i))
        np.testing.assert_array_equal(both.response(len(a) + i, "logprobs"), b.response(i, "logprobs"))


@settings(max_examples=10, deadline=None)
@given(batch=batches())
def test_parquet_is_the_same_thing(tmp_path_factory, batch: RolloutBatch) -> None:
    file = tmp_path_factory.mktemp("parquet") / "b.parquet"
    pq.write_table(batch.to_arrow(), file, row_group_size=2)
    assert_equal(RolloutBatch.from_arrow(pq.read_table(file)), batch)


@settings(max_examples=5)
@given(batches())
def test_rollouts_of_before_there_were_calls_can_be_read(batch: RolloutBatch) -> None:
    old = RolloutBatch.from_arrow(batch.to_arrow().drop_columns(["num_calls"]))
    assert old.num_calls.tolist() == [0] * len(batch)


@settings(max_examples=5)
@given(batches(), batches())
def test_judgements_may_be_missing_from_a_batch(one: RolloutBatch, other: RolloutBatch) -> None:
    other.judged.clear()
    both = RolloutBatch.concat([one, other])
    np.testing.assert_array_equal(both.judged["d"], [*one.judged["d"], *[np.nan] * len(other)])


def test_nothing_cannot_be_concatenated() -> None:
    with pytest.raises(ValueError, match="no rollout batches"):
        RolloutBatch.concat([])


def test_anchors_round_trip(tmp_path) -> None:
    trajectory = Trajectory(
        token_ids=np.array([4, 5, 6], np.int32),
        logprobs=np.array([-0.5, 0.0, -1.5], np.float32),
        versions=np.full(3, CACHED_VERSION, np.int32),
        loss_mask=np.array([1, 0, 1], np.uint8),
        finish_reason="stop",
        num_calls=1,
        judged={"rubric": 0.5},
    )
    anchors = [
        Anchor("a", {"x": 0.5, "y": float("nan")}, 0.25, 8),
        Anchor("b", {"x": 0.0, "y": 1.0}, 0.0, 8, trajectory),
    ]
    pq.write_table(anchors_to_arrow(anchors), tmp_path / "a.parquet")
    back = anchors_from_arrow(pq.read_table(tmp_path / "a.parquet"))
    assert list(back) == ["a", "b"]
    assert back["a"].trajectory is None
    assert np.isnan(back["a"].rewards["y"])
    found = back["b"].trajectory
    for name in ("token_ids", "logprobs", "versions", "loss_mask"):
        np.testing.assert_array_equal(getattr(found, name), getattr(trajectory, name))
        assert getattr(found, name).dtype == getattr(trajectory, name).dtype
    assert (found.finish_reason, found.num_calls, found.judged) == ("stop", 1, {"rubric": 0.5})
    assert found.turn_starts.tolist() == [0, 1, 2]
    assert (back["b"].accuracy, back["b"].num_rollouts) == (0.0, 8)


def test_a_weight_index_is_aligned_and_views_share_the_buffer() -> None:
    index, nbytes = weight_index([("a", "float32", (3, 5)), ("b", "bfloat16", (7,)), ("c", "float32", ())])
    assert all(spec.offset % 64 == 0 for spec in index)
    view = WeightView(np.zeros(nbytes, np.uint8), index)
    for spec, array in view:
        assert array.shape == spec.shape
        assert np.shares_memory(array, view.buffer)
    view.array(index[0])[:] = 1.5
    view.array(index[1])[:] = 7
    assert (view.array(index[0]) == 1.5).all()
    assert view.array(index[2]) == 0


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"n": 0}, "n is 0"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": -1}, "logprobs"),
    ],
)
def test_sampling_parameters_are_checked(bad, named) -> None:
    with pytest.raises(InvalidRequest, match=named):
        SamplingParams(**bad)
