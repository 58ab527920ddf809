"""The segment allocator against a plain set of free blocks, and alignment against brute force."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from thornback.algorithms import SegmentAllocator, align_runs, fate, runs_of

BLOCKS = 40


class Allocations(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = SegmentAllocator(BLOCKS)
        self.free = set(range(BLOCKS))
        self.held: list[list[int]] = []

    def segments(self) -> list[list[int]]:
        """Free blocks as maximal runs."""
        runs: list[list[int]] = []
        for block in sorted(self.free):
            if runs and runs[-1][-1] == block - 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        return runs

    @rule(count=st.integers(1, 12))
    def allocate(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(MemoryError, match="were asked for"):
                self.allocator.allocate(count)
            return
        lengths = sorted((len(run) for run in self.segments()), reverse=True)
        blocks = self.allocator.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= self.free
        fitting = [n for n in lengths if n >= count]
        if fitting:  # the best-fitting segment, in one run
            assert len(runs_of(blocks)) == 1
            run = next(r for r in self.segments() if blocks[0] in r)
            assert len(run) == min(fitting)
        else:  # the fewest segments
            fewest, covered = 0, 0
            while covered < count:
                covered += lengths[fewest]
                fewest += 1
            assert len(runs_of(blocks)) <= fewest
        self.free -= set(blocks)
        self.held.append(blocks)

    @rule(pick=st.integers(0, 99))
    def grow(self, pick: int) -> None:
        if self.held and self.free:
            owner = self.held[pick % len(self.held)]
            block = self.allocator.allocate(1, after=owner[-1])[0]
            assert block in self.free
            if owner[-1] + 1 in self.free:
                assert block == owner[-1] + 1
            self.free.remove(block)
            owner.append(block)

    @rule(pick=st.integers(0, 99), cut=st.integers(0, 12))
    def release(self, pick: int, cut: int) -> None:
        if self.held:
            blocks = self.held.pop(pick % len(self.held))
            gone, kept = blocks[cut:], blocks[:cut]
            self.allocator.release(gone)
            self.free |= set(gone)
            if kept:
                self.held.append(kept)

    @invariant()
    def counts_agree(self) -> None:
        assert self.allocator.num_free == len(self.free)

    def teardown(self) -> None:
        for blocks in self.held:
            self.allocator.release(blocks)
        assert self.allocator.allocate(BLOCKS) == list(range(BLOCKS))  # all merged into one segment again


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.permutations(range(10)), st.permutations(range(10)), st.integers(0, 10))
def test_alignment_covers_each_pair_in_maximal_runs(sender, receiver, count) -> None:
    sender, receiver = sender[:count], receiver[:count]
    runs = align_runs(sender, receiver)
    pairs = [(a + i, b + i) for a, b, length in runs for i in range(length)]
    assert pairs == list(zip(sender, receiver, strict=True))
    for (a, b, length), (c, d, _) in itertools.pairwise(runs):
        assert (a + length, b + length) != (c, d)


def test_one_run_on_both_sides_is_one_call() -> None:
    assert align_runs([5, 6, 7], [0, 1, 2]) == [(5, 0, 3)]
    assert align_runs([5, 6, 7], [0, 2, 3]) == [(5, 0, 1), (6, 2, 2)]
    assert runs_of([3, 4, 9]) == [(3, 2), (9, 1)]
    with pytest.raises(ValueError, match="zip"):
        align_runs([1], [1, 2])


def test_what_becomes_of_a_prompt() -> None:
    assert [fate(a) for a in (0.0, 0.25, 1.0)] == ["ask", "keep", "drop"]
    assert [fate(a, drop_solved=False, drop_unsolved=False) for a in (0.0, 1.0)] == ["keep", "keep"]
    with pytest.raises(ValueError, match="accuracy"):
        fate(1.5)
