"""What a run directory says, read back: the tables from which the report is drawn."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from thornback.contracts import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """One run. `metrics` has one row a step, in order of steps; `evaluations` one row a step and mode.

    `samples_before` and `samples_after` are rows by prompt key; files that are missing read as empty.
    """

    name: str
    config: str
    metrics: list[Row]
    evaluations: list[Row]
    events: list[Row]
    samples_before: dict[str, Row]
    samples_after: dict[str, Row]

    @property
    def reward_names(self) -> list[str]:
        """In the order in which the run reports them."""
        names: dict[str, None] = {}
        for row in [*self.evaluations, *self.metrics]:
            names |= {key.split("/")[1]: None for key in row if key.startswith("reward/")}
        return list(names)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric, at the steps where it is a finite number."""
        points = [(row["step"], row[key]) for row in self.metrics if is_number(row.get(key))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def evaluation_series(self, mode: str, key: str = "accuracy") -> tuple[list[float], list[float]]:
        """Steps and values of one figure of the evaluations in `mode` ("sampled" or "greedy")."""
        points = [(row["step"], row[key]) for row in self.evaluations if row["mode"] == mode and key in row]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def read_run(directory: str | Path) -> RunRecord:
    """Read a run directory, finished or not. Raises DataError where there is none, or a file is not what it says."""
    path = Path(directory)
    if not (path / "config.yaml").is_file():
        raise DataError(f"{path} is no run directory: it has no config.yaml; give the directory that a run wrote.")
    return RunRecord(
        name=path.resolve().name,
        config=(path / "config.yaml").read_text(),
        metrics=_last_of_each(read_json_lines(path / "metrics.jsonl"), "step"),
        evaluations=_last_of_each(read_json_lines(path / "evaluation.jsonl"), "step", "mode"),
        events=read_json_lines(path / "events.jsonl"),
        samples_before=_read_samples(path / "samples_before.parquet"),
        samples_after=_read_samples(path / "samples_after.parquet"),
    )


def read_json_lines(path: Path) -> list[Row]:
    """The rows of a JSON lines file; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline follows: the writer was stopped within this row
                break
            raise DataError(f"{path}, line {number} is not JSON ({error.msg}); remove that line.") from error
    return rows


def is_number(value: Any) -> bool:
    """Finite; a figure that did not apply is None or NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def _last_of_each(rows: list[Row], *keys: str) -> list[Row]:
    """A step that a resumed run took again counts once, as it went the last time; in order of steps."""
    latest = {tuple(row[key] for key in keys): row for row in rows}
    return [latest[key] for key in sorted(latest)]


def _read_samples(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    return {row["prompt_key"]: row for row in reversed(pq.read_table(path).to_pylist())}
