"""How many replicas of a pool Ray Serve is to keep: as many as the gateways' placement has work for."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

DEMAND = "demand"  # the metric that every replica passes on: how many of its kind all gateways together ask for


def by_demand(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """An autoscaling policy: see `Placer.demand`. What Ray Serve counts itself, calls that a replica works on, says
    nothing here, since a link is one call however many requests it carries."""
    newest = [
        max(values, key=lambda value: value.timestamp).value
        for values in (context.raw_metrics or {}).get(DEMAND, {}).values()
        if values
    ]
    if not newest:
        return context.target_num_replicas, {}
    return math.ceil(max(newest) - 0.05), {}  # a twentieth is noise
