"""Pools of blocks that many requests have gone through, and how many calls a hand-over takes then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from thornback.algorithms import align_runs

SHORTEST, LONGEST, BLOCK_SIZE = 500, 10_000, 32  # tokens of a request, log-uniform, and of a block
USE = 0.9  # of a pool, at most
NUM_PREFIXES, PREFIX_BLOCKS = 8, 32  # that requests may begin with, and how long those are: they stay in the cache
MEASURED = 1000  # requests, after the others


class FreeList:
    """vLLM's: a queue of free blocks, of which the one that was freed first is used first."""

    def __init__(self, num_blocks: int) -> None:
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        return [self._free.popleft() for _ in range(num_blocks)]

    def release(self, blocks: Iterable[int]) -> None:
        self._free.extend(blocks)


class Side:
    """A pool whose requests end in no order, as soon as another one needs room."""

    def __init__(self, make: Callable[[int], Any], num_blocks: int, seed: int) -> None:
        self.allocator, self._num_blocks = make(num_blocks), num_blocks
        self._rng = np.random.default_rng([seed, 1])
        self._live: list[list[int]] = []

    def make_room(self, num_blocks: int) -> None:
        while self._live and self._num_blocks - self.allocator.num_free + num_blocks > USE * self._num_blocks:
            place = self._rng.integers(len(self._live))
            self._live[place], self._live[-1] = self._live[-1], self._live[place]
            self.allocator.release(self._live.pop())

    def begin(self, num_blocks: int, prefix: list[int] | None = None) -> list[int]:
        """Blocks of a request; with a `prefix`, as many of its blocks as it has come first, and are not its own."""
        shared = (prefix or [])[: num_blocks - 1]
        self.make_room(num_blocks - len(shared))
        own = self.allocator.allocate(num_blocks - len(shared), after=shared[-1] if shared else None)
        self._live.append(own)
        return [*shared, *own]

    def grow(self, chance: float) -> None:
        """Each request gets another block with this chance, where there is one."""
        for blocks in self._live:
            if self._rng.random() < chance and self.allocator.num_free:
                blocks += self.allocator.allocate(1, after=blocks[-1])


def sizes(count: int, seed: int, most_blocks: int) -> list[int]:
    """Blocks of requests."""
    tokens = np.exp(np.random.default_rng([seed, 2]).uniform(np.log(SHORTEST), np.log(LONGEST), count))
    return np.minimum(np.ceil(tokens / BLOCK_SIZE), most_blocks).astype(int).tolist()


def churned(make: Callable[[int], Any], num_blocks: int, churn: int, seed: int) -> Side:
    """A pool that so many requests have gone through."""
    side = Side(make, num_blocks, seed)
    for size in sizes(churn, seed, num_blocks // 2):
        side.begin(size)
    return side


def mean_calls(
    make: Callable[[int], Any], num_blocks: int, churn: int, growth: float = 0.0, sharing: float = 0.0
) -> tuple[float, int]:
    """Calls of a hand-over after so many, the mean and the most. `growth`: the chance that an answer needs another
    block between two of them, on the receiving side. `sharing`: the chance that a request begins like others, whose
    blocks the sender has in its cache."""
    sender, receiver = (Side(make, num_blocks, seed) for seed in (0, 1))
    prefixes = [sender.allocator.allocate(PREFIX_BLOCKS) for _ in range(NUM_PREFIXES)] if sharing else []
    calls, rng = [], np.random.default_rng(3)
    for size in sizes(churn + MEASURED, 0, num_blocks // 2):
        prefix = prefixes[rng.integers(NUM_PREFIXES)] if rng.random() < sharing else None
        source = sender.begin(size, prefix)
        calls.append(len(align_runs(source, receiver.begin(size))))
        receiver.grow(growth)
    return float(np.mean(calls[churn:])), max(calls[churn:])
