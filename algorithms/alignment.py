"""Runs of neighbouring blocks, on one side of a transfer and on both (FlowKV, papers.md section 4)."""

from __future__ import annotations

from collections.abc import Sequence


def runs_of(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring blocks, in the order given, as runs: `(start, length)`."""
    return [(start, length) for start, _, length in align_runs(blocks, blocks)]


def align_runs(sender: Sequence[int], receiver: Sequence[int]) -> list[tuple[int, int, int]]:
    """`(sender's start, receiver's start, length)` of each run that is contiguous on both sides: one copy each."""
    runs: list[tuple[int, int, int]] = []
    for a, b in zip(sender, receiver, strict=True):
        if runs and (a, b) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((a, b, 1))
    return runs
