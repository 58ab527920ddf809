"""Growing a draft tree by cumulative probability (EAGLE-2, which RASD's drafts follow; papers.md section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Expansion:
    """The nodes that a draft looks behind next. `tokens` `[E]`; `rows` `[E]`: the rows of the level before that they
    stand under; `parents` `[M]`: of all nodes that were expanded so far, these last (-1: under the last token);
    `num_before`: M - E."""

    tokens: np.ndarray
    rows: np.ndarray
    parents: np.ndarray
    num_before: int


class Growth:
    """One sequence's tree while a draft grows it: of each level's nodes the `width` likeliest are expanded."""

    def __init__(self, width: int, max_expanded: int) -> None:
        self._width, self._max_expanded = width, max_expanded
        self._tokens = np.empty(0, np.int32)
        self._parents = np.empty(0, np.int32)
        self._chances = np.empty(0, np.float32)
        self._level = np.array([-1])  # the nodes that the coming rows stand under
        self._new = np.empty(0, np.int64)  # the nodes of the last level, and the row that each came from
        self._new_rows = np.empty(0, np.int64)
        self._place = np.empty(0, np.int64)  # of each node among those that were expanded, or -1
        self._expanded = np.empty(0, np.int32)  # parents of those, counted among themselves

    def add(self, tokens: np.ndarray, chances: np.ndarray) -> None:
        """The likeliest tokens `[R, k]` behind each node of the level, and their probabilities there."""
        num_rows, k = tokens.shape
        before = np.append(self._chances, 1.0)[self._level]  # -1: the last token, which is certain
        start = len(self._tokens)
        self._tokens = np.append(self._tokens, tokens.astype(np.int32))
        self._parents = np.append(self._parents, np.repeat(self._level, k).astype(np.int32))
        self._chances = np.append(self._chances, (chances * before[:, None]).astype(np.float32))
        self._place = np.append(self._place, np.full(num_rows * k, -1))
        self._new = np.arange(start, len(self._tokens))
        self._new_rows = np.repeat(np.arange(num_rows), k)

    def expand(self) -> Expansion:
        """Choose the next level: the likeliest of the nodes that were just added."""
        num_before = len(self._expanded)
        count = min(self._width, self._max_expanded - num_before)
        best = np.argsort(-self._chances[self._new], kind="stable")[:count]
        self._level = self._new[best]
        self._place[self._level] = num_before + np.arange(len(best))
        above = self._parents[self._level]
        self._expanded = np.append(self._expanded, np.where(above < 0, -1, self._place[above]).astype(np.int32))
        return Expansion(self._tokens[self._level], self._new_rows[best], self._expanded, num_before)

    def tree(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, parents and the probability of the path to each node."""
        return self._tokens, self._parents, self._chances
