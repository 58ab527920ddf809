"""A run's figures on Ray's Prometheus endpoints, for dashboards (deploy/grafana-training.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge


class Gauges:
    """The latest row of metrics.jsonl as `ray_thornback_training{run, metric}`, a value for each of its numbers."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauge = Gauge("thornback_training", "A figure of a training run.", tag_keys=("run", "metric"))

    def update(self, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._gauge.set(value, tags={"run": self._run, "metric": name})
