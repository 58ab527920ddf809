"""What a run changed: its first evaluation against its last."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thornback.train.report.record import Row, RunRecord


@dataclass(frozen=True)
class Change:
    """One row of the before/after table. Shares are in [0, 1]; `error` is one standard error of a share."""

    name: str
    mode: str
    before: float
    after: float
    is_share: bool
    error_before: float = 0.0
    error_after: float = 0.0

    @property
    def difference(self) -> float:
        return self.after - self.before


def before_and_after(run: RunRecord) -> list[Change]:
    """The first evaluation of each mode against its last; empty while there is only one."""
    changes = []
    for mode in ("sampled", "greedy"):
        rows = [row for row in run.evaluations if row["mode"] == mode]
        if len(rows) < 2:
            continue
        before, after = rows[0], rows[-1]
        changes.append(
            Change(
                "accuracy",
                mode,
                before["accuracy"],
                after["accuracy"],
                True,
                _standard_error(before),
                _standard_error(after),
            )
        )
        for name in run.reward_names:
            key = f"reward/{name}"
            if key in before and key in after:
                changes.append(Change(name, mode, before[key], after[key], True))
        if "response_length" in before and "response_length" in after:
            changes.append(Change("response length", mode, before["response_length"], after["response_length"], False))
    return changes


def _standard_error(row: Row) -> float:
    share, n = row["accuracy"], max(int(row.get("num_prompts", 0)), 1)
    return math.sqrt(max(share * (1 - share), 0.0) / n)
