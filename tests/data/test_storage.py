"""Rollouts and anchors survive the way to disk and back, whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from thornback.contracts import Anchor, DataError, RolloutBatch, offsets_of
from thornback.data import read_anchors, read_rollouts, write_anchors, write_rollouts


def rollouts() -> RolloutBatch:
    return RolloutBatch(
        prompt_ids=np.array([5, 6, 7, 8], np.int32), prompt_offsets=offsets_of([2, 2]),
        response_ids=np.array([1, 2, 3], np.int32), response_offsets=offsets_of([1, 2]),
        logprobs=np.array([-1, -2, -3], np.float32), versions=np.zeros(3, np.int32), loss_mask=np.ones(3, np.uint8),
        turn_starts=np.zeros(2, np.int32), turn_offsets=offsets_of([1, 1]), prompt_keys=np.array(["a", "a"]),
        sample_index=np.array([0, 1], np.int32), finish_reason=np.array([0, 1], np.int8),
        num_calls=np.array([0, 3], np.int32), correct=np.array([1, np.nan], np.float32),
        rewards={"x": np.array([0.5, np.nan], np.float32)}, judged={"y": np.array([np.nan, 2], np.float32)},
    )  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_round_trips(tmp_path, prefix) -> None:
    place = f"{prefix}{tmp_path}/deep/down/r.parquet"
    write_rollouts(rollouts(), place)
    back = read_rollouts(place)
    np.testing.assert_array_equal(back.logprobs, rollouts().logprobs)
    np.testing.assert_array_equal(back.rewards["x"], rollouts().rewards["x"])
    write_anchors([Anchor("a", {"x": 0.25}, 0.5, 4)], f"{prefix}{tmp_path}/anchors.parquet")
    assert read_anchors(f"{prefix}{tmp_path}/anchors.parquet")["a"].rewards == {"x": 0.25}
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_not_there_or_no_parquet(tmp_path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_anchors(str(tmp_path / "none.parquet"))
    (tmp_path / "bad.parquet").write_text("hello")
    with pytest.raises(DataError, match="no Parquet"):
        read_rollouts(str(tmp_path / "bad.parquet"))
