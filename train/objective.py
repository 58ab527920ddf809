"""From reward tables to advantages: the driver's own arithmetic, on small arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thornback.algorithms import ANCHORED, ESTIMATORS, Advantages, GroupRewards
from thornback.contracts import Anchor, ConfigError
from thornback.train.config import RunConfig

if TYPE_CHECKING:
    from thornback.actors import RewardTable


@dataclass(frozen=True)
class Objective:
    """The rewards that are optimised, in order, and the estimator that turns them into advantages.

    `ranges` `[K, 2]`: every reward is mapped from its range to [0, 1] before the estimator sees it; so are anchors.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    ranges: np.ndarray
    estimator: str
    constants: Mapping[str, float | None]

    @classmethod
    def of(cls, config: RunConfig, names: tuple[str, ...], weights: np.ndarray, ranges: np.ndarray) -> Objective:
        """The configured estimator with the constants of its section; raises `ConfigError` if it does not fit."""
        algorithm = config.algorithm
        constants: dict[str, float | None] = {}
        if algorithm.estimator in ("dvao", "anchored_dvao"):
            constants = algorithm.dvao.model_dump()
        elif algorithm.estimator in ("grpo", "reward_combination", "advantage_combination", "gdpo"):
            constants = algorithm.grpo.model_dump()
        objective = cls(names, weights, ranges, algorithm.estimator, constants)
        objective.check(config.rollout.samples_per_prompt)
        return objective

    def check(self, group_size: int) -> None:
        """Try the estimator on made-up rewards of the run's shape, before any actor starts."""
        k = len(self.names)
        groups = GroupRewards(
            np.linspace(0.0, 1.0, group_size * k).reshape(group_size, k),
            self.names,
            self.weights,
            np.array([0, group_size]),
            np.full((1, k), 0.5),
        )
        try:
            ESTIMATORS[self.estimator](groups, **self.constants)
        except ValueError as error:
            raise ConfigError(f"algorithm.estimator: {error}") from error

    def advantages(
        self, table: RewardTable, group_size: int, keys: tuple[str, ...], anchors: Mapping[str, Anchor] | None
    ) -> Advantages:
        """One advantage a rollout; `keys` (Q) are the prompts', each of which has `group_size` rollouts, in order."""
        raw = np.stack([table.rewards[name] for name in self.names], axis=1).astype(np.float64)
        values = None
        if self.estimator in ANCHORED and anchors is not None:
            rows = [[anchors[key].rewards.get(name, np.nan) for name in self.names] for key in keys]
            values = self.scaled(np.array(rows, np.float64))
        offsets = np.arange(len(keys) + 1) * group_size
        groups = GroupRewards(self.scaled(raw), self.names, self.weights, offsets, values)
        return ESTIMATORS[self.estimator](groups, **self.constants)

    def scaled(self, rewards: np.ndarray) -> np.ndarray:
        """Rewards `[..., K]` from their ranges to [0, 1]."""
        low, high = self.ranges[:, 0], self.ranges[:, 1]
        return (rewards - low) / (high - low)


def reward_metrics(table: RewardTable) -> dict[str, float]:
    """Means and spreads of all rewards over the batch, in their own units, and what else the table tells."""
    judged = table.correct[~np.isnan(table.correct)]
    metrics = {"accuracy": float(judged.mean()) if len(judged) else math.nan}
    for name, values in table.rewards.items():
        applies = values[~np.isnan(values)].astype(np.float64)
        if len(applies):
            metrics[f"reward/{name}/mean"] = float(applies.mean())
            metrics[f"reward/{name}/std"] = float(applies.std())
    metrics["response_length"] = float(table.lengths.mean())
    metrics["truncated_fraction"] = float(table.truncated.mean())
    if table.num_calls.any():
        metrics["tool_calls"] = float(table.num_calls.mean())
    return metrics
