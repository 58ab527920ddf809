"""Positional randomness: one uniform number for every (seed, position), whatever else is going on."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np

from thornback.algorithms.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@compiled
def _mix(x):
    """splitmix64's finaliser: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def _numbers(seeds, positions):
    out = np.empty(len(seeds), np.float64)
    for i in range(len(seeds)):
        state = _mix(seeds[i] * _GOLDEN + _GOLDEN)
        out[i] = np.float64(_mix(state + positions[i] * _GOLDEN) >> np.uint64(11)) * 2.0**-53
    return out


def positional_uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 `[B]` in [0, 1): the number of token `positions[b]` of the stream `seeds[b]` (both int64 or uint64)."""
    return _numbers(seeds.astype(np.uint64, copy=False), positions.astype(np.uint64, copy=False))
