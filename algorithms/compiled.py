"""Loops over small arrays, compiled: a call costs a microsecond, where numpy would take one for each operation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from numba import njit

# numba refuses to keep what it compiled where it may not write.
_KEEP = any(os.access(place, os.W_OK) for place in (os.path.dirname(__file__), os.path.expanduser("~")))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, for the types that it is first called with."""
    return njit(cache=_KEEP, nogil=True)(function)
