"""Loops over small arrays, compiled: a call costs a microsecond, where numpy would take one for each operation."""

# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit


def _cache_directory() -> str:
    """Where machine code is kept, so that only the first process waits for it; empty where nothing may be written. It
    is named by all of this folder: numba sees changes in a function's own file, but not in those that it calls."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    cache = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(cache, "thornback", "algorithms", hashlib.sha256(text).hexdigest()[:16])
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(place) if os.access(place, os.W_OK) else ""


_CACHE = _cache_directory()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, for the types that it is first called with."""
    others, config.CACHE_DIR = config.CACHE_DIR, _CACHE or config.CACHE_DIR
    try:
        return njit(cache=bool(_CACHE), nogil=True)(function)
    finally:
        config.CACHE_DIR = others
