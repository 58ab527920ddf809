"""Growing draft trees by cumulative probability (EAGLE-2, which RASD's drafts follow; papers.md section 3)."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thornback.algorithms.compiled import compiled


@dataclass(frozen=True, slots=True)
class Level:
    """The nodes of B trees that a draft looks behind next, `width` of each. `tokens` `[B * width]`; `rows`
    `[B * width]`: the rows of the pass before that they stand under; `bits` `[B * width]`: what each may see of its
    tree's last token (bit 0) and of the nodes that were looked behind so far, it among them (bit 1 + i, in order);
    `num_before`: how many of those, in each tree, are of earlier levels; `promise` `[B]`: the chances that one of a
    tree's nodes is accepted."""

    tokens: np.ndarray
    rows: np.ndarray
    bits: np.ndarray
    num_before: int
    promise: np.ndarray


class Growth:
    """B trees while a draft grows them: of each level's nodes the `width` likeliest are looked behind, and give the
    `width` likeliest tokens there. At most `depth` levels, and `width * (depth - 1)` at most 63."""

    def __init__(self, num_trees: int, width: int, depth: int) -> None:
        room = width + (depth - 1) * width * width
        self._width, self._size, self._num_before = width, 0, 0
        self._tokens = np.empty((num_trees, room), np.int32)
        self._parents = np.empty((num_trees, room), np.int32)
        self._chances = np.empty((num_trees, room), np.float32)
        self._level = np.full((num_trees, 1), -1)  # the nodes that were looked behind last
        self._bits = np.ones((num_trees, 1), np.int64)  # of those

    def add(self, tokens: np.ndarray, chances: np.ndarray) -> None:
        """The likeliest tokens behind each node of the level, int64 `[B * R, width]`, and their probabilities there,
        float32; R is 1 at first, behind the last token."""
        self._start = self._size
        self._size += self._level.shape[1] * self._width
        _add(self._tokens, self._parents, self._chances, self._start, self._level, tokens, chances)

    def expand(self) -> Level:
        """Choose the likeliest of the nodes that were just added."""
        num_trees, rows = self._level.shape
        level, bits = (np.empty((num_trees, self._width), np.int64) for _ in range(2))
        tokens, from_rows = (np.empty(num_trees * self._width, np.int64) for _ in range(2))
        promise = np.empty(num_trees, np.float32)
        state = self._tokens, self._chances, self._start, self._size, self._num_before, self._bits
        _expand(*state, rows, level, bits, tokens, from_rows, promise)
        self._level, self._bits = level, bits
        expansion = Level(tokens, from_rows, bits.ravel(), self._num_before, promise)
        self._num_before += self._width
        return expansion

    def trees(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each tree all nodes: tokens, parents and the probability of the path to each."""
        size = self._size
        return [
            (t[:size], p[:size], c[:size]) for t, p, c in zip(self._tokens, self._parents, self._chances, strict=True)
        ]


@compiled
def _add(tokens, parents, chances, start, level, new_tokens, new_chances):
    num_trees, num_rows = level.shape
    width = new_tokens.shape[1]
    for tree in range(num_trees):
        at = start
        for row in range(num_rows):
            parent = level[tree, row]
            before = np.float32(1) if parent < 0 else chances[tree, parent]
            for i in range(width):
                tokens[tree, at] = new_tokens[tree * num_rows + row, i]
                parents[tree, at] = parent
                chances[tree, at] = before * new_chances[tree * num_rows + row, i]
                at += 1


@compiled
def _expand(tokens, chances, start, stop, num_before, bits, num_rows, level, new_bits, new_tokens, rows, promise):
    num_trees, width = level.shape
    for tree in range(num_trees):
        order = np.argsort(-chances[tree, start:stop], kind="mergesort")
        total = np.float32(0)
        for i in range(width):
            node = start + order[i]
            row = (node - start) // width  # each row of the pass before has given as many nodes
            level[tree, i] = node
            new_bits[tree, i] = bits[tree, row] | 1 << (num_before + i + 1)
            new_tokens[tree * width + i] = tokens[tree, node]
            rows[tree * width + i] = tree * num_rows + row
            total += chances[tree, node]
        promise[tree] = total
