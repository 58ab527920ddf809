"""Trees that a draft grows: compared with what a plain search of the likeliest nodes finds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import Growth


def chance(path, width):
    """A made-up distribution behind any path: `width` tokens and their probabilities, falling."""
    rng = np.random.default_rng([len(path), *path])
    tokens = rng.permutation(50)[:width]
    return tokens, np.sort(rng.dirichlet(np.ones(width + 2))[:width])[::-1].astype(np.float32)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_growth(num_trees, width, depth) -> None:
    growth = Growth(num_trees, width, depth)
    # The paths behind which each tree is looked at, level by level, found by sorting.
    behind = [[(tree,)] for tree in range(num_trees)]
    wanted = [{} for _ in range(num_trees)]
    seen = [[] for _ in range(num_trees)]  # all paths that were looked behind so far
    for level in range(depth):
        rows = [chance(path, width) for paths in behind for path in paths]
        growth.add(np.array([t for t, _ in rows]), np.array([c for _, c in rows]))
        coming = []
        for tree, paths in enumerate(behind):
            found = {}
            for path in paths:
                for token, p in zip(*chance(path, width), strict=True):
                    found[(*path, int(token))] = np.float32(wanted[tree].get(path, np.float32(1)) * p)
            wanted[tree] |= found
            coming.append(sorted(found, key=lambda path: -found[path])[:width])
        if level == depth - 1:
            break
        expansion = growth.expand()
        assert expansion.num_before == level * width
        for tree, paths in enumerate(coming):
            mine = slice(tree * width, (tree + 1) * width)
            assert expansion.tokens[mine].tolist() == [path[-1] for path in paths]
            start = sum(len(b) for b in behind[:tree])
            assert expansion.rows[mine].tolist() == [start + behind[tree].index(path[:-1]) for path in paths]
            seen[tree] += paths
            for bits, path in zip(expansion.bits[mine].tolist(), paths, strict=True):
                ancestors = {seen[tree].index(path[:n]) + 1 for n in range(2, len(path) + 1)}
                assert {b for b in range(64) if bits >> b & 1} == {0, *ancestors}
            np.testing.assert_allclose(expansion.promise[tree], sum(wanted[tree][path] for path in paths), rtol=1e-5)
        behind = coming
    for tree, (tokens, parents, chances) in enumerate(growth.trees()):
        paths = []
        for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else (tree,)), token))
        assert dict(zip(paths, chances, strict=True)) == wanted[tree]
