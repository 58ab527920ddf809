"""What made-up tasks share: problems that are drawn, each once, and a split that hangs on nothing but their text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def is_held_out(text: str, share: float) -> bool:
    """Whether the hash of `text` says so, with a chance of `share`: the same in every run, whatever its seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def distinct(
    draws: Iterable[T | None],
    count: int,
    key: Callable[[T], str],
    refuse: Callable[[int], Exception],
    patience: int = 1000,
) -> Iterator[T]:
    """The first `count` draws of different keys; None is a draw that does not count. After `patience` misses for each
    that was found, and for a hundred more, it raises what `refuse` makes of their number."""
    seen: set[str] = set()
    misses = 0
    for draw in draws:
        if len(seen) == count:
            return
        if draw is None or key(draw) in seen:
            misses += 1
            if misses > patience * (len(seen) + 100):
                raise refuse(len(seen))
            continue
        seen.add(key(draw))
        yield draw
