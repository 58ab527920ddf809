"""What every estimator takes and gives, and the statistics that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

EPS = 1e-6


@dataclass(frozen=True)
class GroupRewards:
    """R rollouts of Q prompts, judged by K rewards.

    `values` float64 `[R, K]` in [0, 1], NaN where a reward does not apply; `names` (K); base `weights` `[K]`, at
    least 0, divided by their sum here; `group_offsets` int64 `[Q + 1]`: the rollouts of one prompt stand next to
    each other. `anchors` `[Q, K]`: the reference policy's mean rewards, for the estimators that need them.
    Raises `ValueError` for shapes that disagree, empty groups, infinities, and weights that are negative or all 0.
    """

    values: np.ndarray
    names: tuple[str, ...]
    weights: np.ndarray
    group_offsets: np.ndarray
    anchors: np.ndarray | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, np.float64)
        weights = np.asarray(self.weights, np.float64)
        offsets = np.asarray(self.group_offsets, np.int64)
        k = len(self.names)
        if values.ndim != 2 or values.shape[1] != k:
            raise ValueError(f"rewards have shape {values.shape}, but must be [rollouts, {k}]: {k} are named.")
        if weights.shape != (k,) or not (weights >= 0).all() or not np.isfinite(weights).all() or weights.sum() == 0:
            raise ValueError(f"weights must be {k} numbers of 0 or more, not all 0, but are {weights.tolist()}.")
        if offsets.ndim != 1 or len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(values):
            raise ValueError(f"group offsets must run from 0 to the number of rollouts, {len(values)}.")
        if (np.diff(offsets) < 1).any():
            raise ValueError(f"group {int(np.argmax(np.diff(offsets) < 1))} is empty: each needs a rollout.")
        if np.isinf(values).any():
            row, column = np.argwhere(np.isinf(values))[0]
            raise ValueError(f"reward {self.names[column]} of rollout {row} is infinite.")
        if self.anchors is not None:
            anchors = np.asarray(self.anchors, np.float64)
            if anchors.shape != (len(offsets) - 1, k):
                raise ValueError(f"anchors have shape {anchors.shape}, but must be [groups, rewards].")
            object.__setattr__(self, "anchors", anchors)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "group_offsets", offsets)

    @cached_property
    def group_of(self) -> np.ndarray:
        """int64 `[R]`: each rollout's group."""
        return np.repeat(np.arange(len(self.group_offsets) - 1), np.diff(self.group_offsets))

    @cached_property
    def count(self) -> np.ndarray:
        """`[Q, K]`: rollouts to which each reward applies."""
        return self.sum_groups((~np.isnan(self.values)).astype(np.float64))

    @cached_property
    def mean(self) -> np.ndarray:
        """mu, `[Q, K]`, over the rollouts to which a reward applies (0 where there is none)."""
        return self.sum_groups(np.nan_to_num(self.values)) / np.maximum(self.count, 1)

    @cached_property
    def centred(self) -> np.ndarray:
        """r - mu, `[R, K]`; 0 where a reward does not apply: that term is left out, not the group."""
        return self.less(self.mean)

    @cached_property
    def std(self) -> np.ndarray:
        """s, `[Q, K]`: the population standard deviation."""
        return self.rms(self.centred)

    def less(self, baseline: np.ndarray) -> np.ndarray:
        """r - baseline, `[R, K]`, for a baseline `[Q, K]`; 0 where either is NaN."""
        return np.nan_to_num(self.values - baseline[self.group_of])

    def rms(self, deviations: np.ndarray) -> np.ndarray:
        """`[Q, K]`: root mean square of `[R, K]` over the rollouts to which a reward applies."""
        return np.sqrt(self.sum_groups(deviations**2) / np.maximum(self.count, 1))

    def sum_groups(self, x: np.ndarray) -> np.ndarray:
        """Sums over the rollouts of each group: `[R, ...]` to `[Q, ...]`."""
        return np.add.reduceat(x, self.group_offsets[:-1], axis=0)

    def needed_anchors(self, estimator: str) -> np.ndarray:
        if self.anchors is None:
            raise ValueError(f"{estimator} needs anchors: run pre-sampling first.")
        return self.anchors


@dataclass(frozen=True)
class Advantages:
    """`values` float64 `[R]`, one number for all tokens of a rollout; `weights` `[Q, K]`: what each reward counts in
    each group (`effective_weights`); `metrics`: sizes to log."""

    values: np.ndarray
    effective_weights: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: GroupRewards, values: np.ndarray, weights: np.ndarray | None = None) -> Advantages:
        """With the metrics that every estimator logs. `weights` None: the base weights."""
        if weights is None:
            weights = np.broadcast_to(groups.weights, groups.mean.shape)
        size = np.abs(values)
        nonzero = groups.sum_groups((size > 0).astype(np.float64)) > 0
        metrics = {
            "advantage/abs_mean": float(size.mean()),
            "advantage/abs_max": float(size.max()),
            "advantage/mean_square": float((values**2).mean()),
            "advantage/nonzero_groups": float(nonzero.mean()),
        }
        metrics |= {f"weight/{name}": float(w) for name, w in zip(groups.names, weights.mean(0), strict=True)}
        return cls(values, weights, metrics)


# From rewards to advantages; keywords are the constants of the estimator's section of the configuration.
Estimator = Callable[..., Advantages]


def ratio(numerator: np.ndarray, denominator: np.ndarray, eps: float) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is below eps."""
    small = denominator < eps
    return np.where(small, 0.0, numerator / np.where(small, 1.0, denominator))
