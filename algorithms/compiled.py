"""Loops over small arrays, compiled: a call costs a microsecond, where numpy would take one for each operation."""

# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numba import config, njit


def cache_directory(name: str, sources: Iterable[Path]) -> str:
    """Where machine code of this name is kept, so that only the first process waits for it; empty where nothing may be
    written. It is named by all that the code is made of: numba sees changes in a function's own file, but not in those
    that it calls."""
    text = b"".join(path.read_bytes() for path in sources)
    cache = config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = Path(cache, "thornback", name, hashlib.sha256(text).hexdigest()[:16])
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(place) if os.access(place, os.W_OK) else ""


@contextmanager
def kept_in(directory: str) -> Iterator[None]:
    """What is compiled by numba meanwhile is kept there."""
    others, config.CACHE_DIR = config.CACHE_DIR, directory
    try:
        yield
    finally:
        config.CACHE_DIR = others


_CACHE = cache_directory("algorithms", sorted(Path(__file__).parent.glob("*.py")))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, for the types that it is first called with."""
    with kept_in(_CACHE):
        return njit(cache=bool(_CACHE), nogil=True)(function)
