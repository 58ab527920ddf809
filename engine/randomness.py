"""Positional randomness: one uniform number for every (seed, position), whatever else is going on."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def positional_uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 `[B]` in [0, 1): the number of token `positions[b]` of the stream `seeds[b]` (both int64 or uint64)."""
    with np.errstate(over="ignore"):
        state = _mix(seeds.astype(np.uint64) * _GOLDEN + _GOLDEN)
        bits = _mix(state + positions.astype(np.uint64) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
