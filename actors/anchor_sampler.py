"""The anchor sampler: what a fixed policy is worth on each prompt (PVPO, papers.md section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import ray

from thornback.actors.reward_model import RewardModelCore, RewardTable
from thornback.actors.rollout_worker import GenerationReport, PromptShard, RolloutWorkerCore
from thornback.actors.specs import RolloutSpec
from thornback.actors.supervision import Home
from thornback.contracts import (
    Anchor,
    Prompt,
    RewardScorer,
    RolloutBatch,
    SamplingParams,
    anchors_to_arrow,
)
from thornback.data import check_failures, write_rollouts


class AnchorSamplerCore:
    """An engine over a reference policy (or a larger model) and a scorer, in one process."""

    def __init__(
        self, spec: RolloutSpec, make_scorer: Callable[[], RewardScorer], max_failed_share: float = 0.0
    ) -> None:
        self._max_failed_share = max_failed_share
        self._worker = RolloutWorkerCore(spec)
        self._judge = RewardModelCore(make_scorer, spec.model)

    def setup(self) -> Home:
        self._judge.setup()
        return self._worker.setup()

    @ray.method(num_returns=2)
    def sample(
        self,
        shard: PromptShard,
        prompts: tuple[Prompt, ...],
        sampling: SamplingParams,
        keep_trajectory: bool = False,
        location: str | None = None,
    ) -> tuple[pa.Table, GenerationReport]:
        """The anchors of a shard's prompts from `sampling.n` rollouts each, as rows of the anchors' file.

        `keep_trajectory`: keep each prompt's first right answer, with its log-probabilities under this model.
        `location`: write the rollouts there, as Parquet. Raises `RewardError` where more than `max_failed_share` of the
        rollouts meet a reward that fails.
        """
        batch, report = self._worker.generate(shard, sampling, 0, prompts)
        table = self._judge.score(batch, prompts)
        check_failures(table.failures, len(batch), self._max_failed_share)
        if location is not None:
            write_rollouts(batch.with_scores(table.rewards, table.correct), location)
        anchors = anchors_of(shard.keys, table, sampling.n)
        if keep_trajectory:
            anchors = [with_trajectory(a, i * sampling.n, batch, table) for i, a in enumerate(anchors)]
        return anchors_to_arrow(anchors), report


def anchors_of(keys: Sequence[str], table: RewardTable, num_rollouts: int) -> list[Anchor]:
    """V per reward, and the accuracy, of each prompt from its `num_rollouts` rollouts, which are neighbours."""

    def mean(values: np.ndarray) -> np.ndarray:
        groups = values.reshape(len(keys), num_rollouts).astype(np.float64)
        applies = ~np.isnan(groups)
        counts = applies.sum(1)
        sums = np.where(applies, groups, 0.0).sum(1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    means = {name: mean(values) for name, values in table.rewards.items()}
    accuracy = mean(table.correct)
    return [
        Anchor(key, {name: float(values[i]) for name, values in means.items()}, float(accuracy[i]), num_rollouts)
        for i, key in enumerate(keys)
    ]


def with_trajectory(anchor: Anchor, first: int, batch: RolloutBatch, table: RewardTable) -> Anchor:
    """The anchor with the first right one of its rollouts, which begin at row `first`, if there is one."""
    right = np.flatnonzero(table.correct[first : first + anchor.num_rollouts] > 0)
    if len(right) == 0:
        return anchor
    return replace(anchor, trajectory=batch.trajectory(first + int(right[0])))


AnchorSampler = ray.remote(AnchorSamplerCore)
