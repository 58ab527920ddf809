"""Documents with the suffix arrays by which they are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thornback.contracts import TokenForest, TokenTree
from thornback.data.lookup import LEVELS, look_up, look_up_all, thin, tree_of
from thornback.data.suffix_array import DEPTH, merge_orders, sort_places


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Documents end to end, uint32 `[T]`, their suffix array and its thinned ones, uint32: views of a mapped file, it
    may be. `start`: which of the store's tokens the first one is."""

    tokens: np.ndarray
    orders: tuple[np.ndarray, ...]
    start: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, tokens: np.ndarray, start: int = 0) -> Segment:
        return cls(tokens, _thinned(sort_places(tokens), start), start)

    def merge(self, after: Segment) -> Segment:
        """With the segment that comes right after this one."""
        tokens = np.concatenate([self.tokens, after.tokens])
        order = merge_orders(tokens, self.orders[0].copy(), after.orders[0].copy())
        return Segment(tokens, _thinned(order, self.start), self.start)


def _thinned(order: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    return (order, *(thin(order, start, level) for level in range(1, LEVELS)))


class View:
    """Segments as look-ups read them. It does not change: what is new is another view."""

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        self.segments = tuple(segments)
        rows = [[*_place(s.tokens), s.start, *(v for order in s.orders for v in _place(order))] for s in self.segments]
        self._table = np.array(rows, np.int64).reshape(len(rows), 3 + 2 * LEVELS)

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        return tree_of(*look_up(self._table, np.array(context[-DEPTH:], np.int64), num_nodes))

    def retrieve_all(self, tokens: np.ndarray, stops: np.ndarray, num_nodes: int) -> TokenForest:
        columns, ends = look_up_all(self._table, tokens, stops, num_nodes)
        return TokenForest(columns, *ends)


def _place(array: np.ndarray) -> tuple[int, int]:
    return array.__array_interface__["data"][0], len(array)
