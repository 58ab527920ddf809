"""Rollouts as flat arrays. A batch in memory and a Parquet file are the same thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa

FINISH_REASONS = ("stop", "length", "abort")
REWARD_PREFIX, JUDGED_PREFIX = "reward.", "judged."
CACHED_VERSION = -1  # version of tokens that no policy of the run drew: a cached right trajectory (PVPO)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One rollout, not judged by rewards yet; its arrays `[T]` and other fields are those of a `RolloutBatch`."""

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    loss_mask: np.ndarray
    finish_reason: str
    num_calls: int = 0
    judged: Mapping[str, float] = field(default_factory=dict)

    @property
    def turn_starts(self) -> np.ndarray:
        """int32: where the model and its environment take over from each other, and 0."""
        return np.concatenate([[0], np.flatnonzero(np.diff(self.loss_mask)) + 1]).astype(np.int32)


@dataclass(frozen=True, slots=True)
class RolloutBatch:
    """R rollouts as ragged arrays: values of all rollouts end to end, and offsets `[R + 1]` into them.

    `prompt_ids` int32 `[sum P]`; `response_ids` int32, `logprobs` float32, `versions` int32 and `loss_mask`
    uint8, all `[sum T]`: the sampled token, its log-probability at sampling (after temperature, before
    truncation), the policy version that drew it, and 1 where the model wrote it (0: an environment did).
    `turn_starts` int32 `[sum turns]`: where in the response each turn begins.
    Per rollout `[R]`: `prompt_keys` (unicode), `sample_index` int32, `finish_reason` int8 (index into
    FINISH_REASONS; "abort": its environment failed), `num_calls` int32 (tool calls), `correct` float32 in {0, 1}
    (NaN: not judged), and `rewards[name]` float32 (NaN: does not apply). `judged[name]` float32 is what environments
    judged themselves (NaN: nothing). Rollouts of one prompt stand next to each other, in order of `sample_index`.
    """

    prompt_ids: np.ndarray
    prompt_offsets: np.ndarray
    response_ids: np.ndarray
    response_offsets: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    loss_mask: np.ndarray
    turn_starts: np.ndarray
    turn_offsets: np.ndarray
    prompt_keys: np.ndarray
    sample_index: np.ndarray
    finish_reason: np.ndarray
    num_calls: np.ndarray
    correct: np.ndarray
    rewards: dict[str, np.ndarray]
    judged: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.sample_index)

    @property
    def response_lengths(self) -> np.ndarray:
        """int64 `[R]`."""
        return np.diff(self.response_offsets)

    def prompt(self, i: int) -> np.ndarray:
        return self.prompt_ids[self.prompt_offsets[i] : self.prompt_offsets[i + 1]]

    def response(self, i: int, column: str = "response_ids") -> np.ndarray:
        """Rollout i's slice of one of the per-token columns."""
        return getattr(self, column)[self.response_offsets[i] : self.response_offsets[i + 1]]

    def trajectory(self, i: int) -> Trajectory:
        """Rollout i by itself."""
        return Trajectory(
            token_ids=self.response(i),
            logprobs=self.response(i, "logprobs"),
            versions=self.response(i, "versions"),
            loss_mask=self.response(i, "loss_mask"),
            finish_reason=FINISH_REASONS[self.finish_reason[i]],
            num_calls=int(self.num_calls[i]),
            judged={name: float(values[i]) for name, values in self.judged.items() if not np.isnan(values[i])},
        )

    def with_scores(self, rewards: dict[str, np.ndarray], correct: np.ndarray) -> RolloutBatch:
        """The same rollouts with judgements."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return RolloutBatch(**{**values, "rewards": rewards, "correct": correct})

    def to_arrow(self) -> pa.Table:
        """One row a rollout; ragged columns are lists, rewards are columns named `reward.<name>`."""

        def ragged(values: np.ndarray, offsets: np.ndarray) -> pa.Array:
            return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values))

        columns = {
            "prompt_key": pa.array(self.prompt_keys.tolist(), pa.string()),
            "sample_index": pa.array(self.sample_index),
            "prompt_ids": ragged(self.prompt_ids, self.prompt_offsets),
            "response_ids": ragged(self.response_ids, self.response_offsets),
            "logprobs": ragged(self.logprobs, self.response_offsets),
            "versions": ragged(self.versions, self.response_offsets),
            "loss_mask": ragged(self.loss_mask, self.response_offsets),
            "turn_starts": ragged(self.turn_starts, self.turn_offsets),
            "finish_reason": pa.array([FINISH_REASONS[i] for i in self.finish_reason], pa.string()),
            "num_calls": pa.array(self.num_calls),
            "correct": pa.array(self.correct),
        }
        columns |= {f"{REWARD_PREFIX}{name}": pa.array(values) for name, values in self.rewards.items()}
        columns |= {f"{JUDGED_PREFIX}{name}": pa.array(values) for name, values in self.judged.items()}
        return pa.table(columns)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> RolloutBatch:
        """The inverse of `to_arrow`; also of a table that was filtered, sliced or read back from Parquet."""

        def column(name: str) -> pa.Array:
            chunks = table[name].chunks
            return pa.concat_arrays(chunks) if chunks else pa.array([], table[name].type)

        def ragged(name: str, dtype: type) -> tuple[np.ndarray, np.ndarray]:
            lists = column(name)
            lengths = np.asarray(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
            return lists.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False), offsets_of(lengths)

        def flat(name: str, dtype: type) -> np.ndarray:
            return column(name).to_numpy(zero_copy_only=False).astype(dtype, copy=False)

        def named(prefix: str) -> dict[str, np.ndarray]:
            names = [name for name in table.column_names if name.startswith(prefix)]
            return {name.removeprefix(prefix): flat(name, np.float32) for name in names}

        prompt_ids, prompt_offsets = ragged("prompt_ids", np.int32)
        response_ids, response_offsets = ragged("response_ids", np.int32)
        turn_starts, turn_offsets = ragged("turn_starts", np.int32)
        return cls(
            prompt_ids=prompt_ids,
            prompt_offsets=prompt_offsets,
            response_ids=response_ids,
            response_offsets=response_offsets,
            logprobs=ragged("logprobs", np.float32)[0],
            versions=ragged("versions", np.int32)[0],
            loss_mask=ragged("loss_mask", np.uint8)[0],
            turn_starts=turn_starts,
            turn_offsets=turn_offsets,
            prompt_keys=np.array(column("prompt_key").to_pylist(), dtype=np.str_),
            sample_index=flat("sample_index", np.int32),
            finish_reason=np.array([FINISH_REASONS.index(r) for r in column("finish_reason").to_pylist()], np.int8),
            num_calls=flat("num_calls", np.int32)
            if "num_calls" in table.column_names
            else np.zeros(len(table), np.int32),
            correct=flat("correct", np.float32),
            rewards=named(REWARD_PREFIX),
            judged=named(JUDGED_PREFIX),
        )

    @classmethod
    def concat(cls, batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """Batches end to end, in the order given. All must carry the same rewards; judgements may be missing."""
        if not batches:
            raise ValueError("nothing to concatenate: no rollout batches were given.")

        def joined(name: str) -> np.ndarray:
            arrays = [getattr(b, name) for b in batches]
            if name.endswith("_offsets"):
                return offsets_of(np.concatenate([np.diff(a) for a in arrays]))
            return np.concatenate(arrays)

        def judged(name: str) -> np.ndarray:
            nothing = (np.full(len(b), np.nan, np.float32) for b in batches)
            return np.concatenate([b.judged.get(name, none) for b, none in zip(batches, nothing, strict=True)])

        return cls(
            **{f.name: joined(f.name) for f in fields(cls) if f.name not in ("rewards", "judged")},
            rewards={name: np.concatenate([b.rewards[name] for b in batches]) for name in batches[0].rewards},
            judged={name: judged(name) for name in dict.fromkeys(name for b in batches for name in b.judged)},
        )


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 `[len + 1]` offsets of consecutive pieces of these lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True, slots=True)
class Anchor:
    """What the reference policy is worth on one prompt (PVPO's V, one per reward).

    `rewards[name]` is the mean over `num_rollouts` reference rollouts (NaN where it never applied), `accuracy`
    their share of correct verdicts. `trajectory` is a cached right answer, with the log-probabilities under the model
    that wrote it, where one was asked for.
    """

    prompt_key: str
    rewards: dict[str, float]
    accuracy: float
    num_rollouts: int
    trajectory: Trajectory | None = None


_TRAJECTORY = pa.struct(
    {
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
        "loss_mask": pa.list_(pa.uint8()),
        "finish_reason": pa.string(),
        "num_calls": pa.int32(),
        "judged": pa.map_(pa.string(), pa.float32()),
    }
)


def anchors_to_arrow(anchors: Sequence[Anchor]) -> pa.Table:
    """One row a prompt; rewards are columns named `reward.<name>`."""
    names = list(anchors[0].rewards) if anchors else []
    columns = {
        "prompt_key": pa.array([a.prompt_key for a in anchors], pa.string()),
        "accuracy": pa.array([a.accuracy for a in anchors], pa.float32()),
        "num_rollouts": pa.array([a.num_rollouts for a in anchors], pa.int32()),
        "trajectory": pa.array([_to_row(a.trajectory) for a in anchors], _TRAJECTORY),
    }
    columns |= {f"{REWARD_PREFIX}{n}": pa.array([a.rewards[n] for a in anchors], pa.float32()) for n in names}
    return pa.table(columns)


def anchors_from_arrow(table: pa.Table) -> dict[str, Anchor]:
    """The inverse of `anchors_to_arrow`, by prompt key."""
    names = [c for c in table.column_names if c.startswith(REWARD_PREFIX)]
    return {
        row["prompt_key"]: Anchor(
            prompt_key=row["prompt_key"],
            rewards={n.removeprefix(REWARD_PREFIX): row[n] for n in names},
            accuracy=row["accuracy"],
            num_rollouts=row["num_rollouts"],
            trajectory=_from_row(row["trajectory"]),
        )
        for row in table.to_pylist()
    }


def _to_row(trajectory: Trajectory | None) -> dict[str, Any] | None:
    if trajectory is None:
        return None
    return {
        "token_ids": trajectory.token_ids.tolist(),
        "logprobs": trajectory.logprobs.tolist(),
        "loss_mask": trajectory.loss_mask.tolist(),
        "finish_reason": trajectory.finish_reason,
        "num_calls": trajectory.num_calls,
        "judged": list(trajectory.judged.items()),
    }


def _from_row(row: dict[str, Any] | None) -> Trajectory | None:
    if row is None:
        return None
    return Trajectory(
        token_ids=np.asarray(row["token_ids"], np.int32),
        logprobs=np.asarray(row["logprobs"], np.float32),
        versions=np.full(len(row["token_ids"]), CACHED_VERSION, np.int32),
        loss_mask=np.asarray(row["loss_mask"], np.uint8),
        finish_reason=row["finish_reason"],
        num_calls=row["num_calls"],
        judged=dict(row["judged"]),
    )
