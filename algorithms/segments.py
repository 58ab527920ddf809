"""The KV pool's free space as contiguous segments (FlowKV, papers.md section 4)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


class SegmentAllocator:
    """Blocks `0 .. num_blocks - 1`. A request gets the best-fitting segment, or the fewest; neighbours merge."""

    def __init__(self, num_blocks: int) -> None:
        self.num_free = num_blocks
        self._end_of: dict[int, int] = {}  # first block -> one past the last
        self._start_of: dict[int, int] = {}
        self._by_length: list[tuple[int, int]] = []  # (length, first block), sorted
        if num_blocks:
            self._add(0, num_blocks)

    def allocate(self, num_blocks: int, after: int | None = None) -> list[int]:
        """`num_blocks` free blocks, going on right behind block `after` where that is free."""
        if num_blocks > self.num_free:
            raise MemoryError(f"{num_blocks} blocks were asked for, but {self.num_free} are free.")
        blocks: list[int] = []
        if after is not None and after + 1 in self._end_of:
            blocks += self._take(after + 1, num_blocks)
        while len(blocks) < num_blocks:
            missing = num_blocks - len(blocks)
            best = min(bisect_left(self._by_length, (missing, -1)), len(self._by_length) - 1)
            blocks += self._take(self._by_length[best][1], missing)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            start, end = block, block + 1
            if end in self._end_of:
                end = self._remove(end)
            if block in self._start_of:
                start = self._start_of[block]
                self._remove(start)
            self._add(start, end)
            self.num_free += 1

    def _take(self, start: int, at_most: int) -> range:
        end = self._remove(start)
        cut = min(end, start + at_most)
        if cut < end:
            self._add(cut, end)
        self.num_free -= cut - start
        return range(start, cut)

    def _add(self, start: int, end: int) -> None:
        self._end_of[start] = end
        self._start_of[end] = start
        insort(self._by_length, (end - start, start))

    def _remove(self, start: int) -> int:
        end = self._end_of.pop(start)
        del self._start_of[end]
        del self._by_length[bisect_left(self._by_length, (end - start, start))]
        return end
