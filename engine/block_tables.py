"""The blocks of a pass's sequences in one array, as kernels read them."""

from __future__ import annotations

import numpy as np

_AHEAD = 8  # blocks for which there is room, so that coming passes can go on with the array


class BlockTables:
    """Keeps the array from pass to pass: rows whose sequences have the blocks that they had stay as they are."""

    def __init__(self) -> None:
        self._array = np.zeros((0, 0), np.int64)
        self._rows: list[list[int]] = []

    def of(self, tables: list[list[int]]) -> np.ndarray:
        """int64 `[B, N]`: the blocks `tables[i]`, and anything behind them. It is good until the next call."""
        longest = max(map(len, tables))
        if len(tables) != len(self._rows) or longest > self._array.shape[1]:
            self._array = np.zeros((len(tables), longest + _AHEAD), np.int64)
            self._rows = [[] for _ in tables]
        for row, blocks in enumerate(tables):
            if blocks != self._rows[row]:
                self._array[row, : len(blocks)] = blocks
                self._rows[row] = blocks.copy()
        return self._array
