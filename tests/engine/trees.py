"""Draft trees for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thornback.contracts import TokenTree


def tree_of(paths: Sequence[Sequence[int]]) -> TokenTree:
    """A trie of paths, each of the same weight."""
    known: dict[tuple[int, int], int] = {}
    counts: list[int] = []
    for path in paths:
        node = -1
        for token in path:
            if (node, token) not in known:
                known[node, token] = len(counts)
                counts.append(0)
            node = known[node, token]
            counts[node] += 1
    tokens, parents = [t for _, t in known], [p for p, _ in known]
    return TokenTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.array(counts, np.float32))
