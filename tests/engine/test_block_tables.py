"""Rows follow their sequences' blocks, whatever was there before."""

from __future__ import annotations

import numpy as np

from thornback.engine.block_tables import BlockTables


def test_rows_are_what_sequences_hold_now() -> None:
    rng, tables = np.random.default_rng(0), BlockTables()
    held = [[1], [2, 3]]
    for _ in range(300):
        array = tables.of(held)
        assert array.dtype == np.int64
        for row, blocks in zip(array.tolist(), held, strict=True):
            assert row[: len(blocks)] == blocks
        seq = int(rng.integers(0, len(held)))
        match int(rng.integers(0, 4)):
            case 0:
                held[seq].append(int(rng.integers(0, 99)))
            case 1:  # taken back, and others given: as many as before
                held[seq][-1] = int(rng.integers(0, 99))
            case 2 if len(held[seq]) > 1:
                held[seq].pop()
            case _:
                kept = rng.permutation(len(held))[: int(rng.integers(1, 4))]
                held = [*(list(held[i]) for i in kept), [5]]


def test_the_array_is_kept_while_it_is_large_enough() -> None:
    tables = BlockTables()
    first = tables.of([[1, 2], [3]])
    assert tables.of([[1, 2], [3, 4]]) is first
    assert tables.of([[1, 2], list(range(40))]) is not first
