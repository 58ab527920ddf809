"""What is done to the trees of several sequences at once is what is done to each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.algorithms.test_trees import check_shape, fused, tries, walk
from thornback.algorithms import agree_all, agreement, best_size, choose, fuse_all, likelihoods, verify, verify_all

SIZES, SECONDS = np.array([1.0, 8.0, 64.0]), np.array([1.0, 1.5, 9.0])
SEQUENCES = st.lists(st.lists(st.tuples(tries(), st.integers(-1, 16)), max_size=3), max_size=4)


def end_to_end(trees):
    empty = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
    columns = [np.concatenate(column) for column in zip(empty, *(tree[:3] for tree in trees), strict=True)]
    return columns, np.cumsum([len(tree[0]) for tree in trees], dtype=np.int64)


def parts(columns, stops):
    return [tuple(c[a:b] for c in columns) for a, b in pairwise([0, *stops])]


def fused_all(sequences, num_nodes=10, max_depth=4):
    """What `fuse_all` says of sources (tree, match length), each with a doubt of its length's tenth."""
    columns, sources = end_to_end([tree for sequence in sequences for tree, _ in sequence])
    for tree, part in zip([t for s in sequences for t in s], parts(columns, sources), strict=True):
        if tree[1] < 0:
            part[2][:] = part[2] / max(part[2].max(initial=1), 1)  # chances
    matches = np.array([match for sequence in sequences for _, match in sequence], np.int64)
    stops = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64)
    depths = np.full(len(sequences), max_depth)
    return fuse_all(*columns, matches, matches / 10, sources, stops, num_nodes, depths)


@given(SEQUENCES)
def test_fusion(sequences) -> None:
    *columns, stops = fused_all(sequences)
    for found, sequence in zip(parts(columns, stops), sequences, strict=True):
        trees = []
        for (tokens, parents, weights, _), match in sequence:
            nothing = np.empty(0, np.float32)
            of = (tokens, parents, weights)
            believed = match, match / 10, nothing, 0.0
            chances = weights / max(weights.max(initial=1), 1) if match < 0 else likelihoods(*of, *believed)
            trees.append((tokens, parents, chances.astype(np.float32)))
        if not trees:
            assert not len(found[0])
            continue
        for mine, alone in zip(found, fused(*trees, num_nodes=10, max_depth=4), strict=True):
            np.testing.assert_array_equal(mine, alone)


@given(SEQUENCES, st.data())
def test_the_best_nodes_of_all_are_chosen(sequences, data) -> None:
    tokens, parents, chances, stops = fused_all(sequences)
    beliefs = np.array([data.draw(st.floats(0.1, 3)) for _ in sequences])
    believed = np.minimum(chances * np.repeat(beliefs, np.diff(stops, prepend=0)).astype(np.float32), 1)
    size = best_size(np.sort(believed)[::-1].copy(), max(1, len(sequences)), max(1, len(sequences)), SECONDS, SIZES)
    number = max(1, len(sequences))
    *columns, ends = choose(tokens, parents, chances, stops, beliefs, number, number, SECONDS, SIZES)
    assert len(columns[0]) == size
    every = parts((tokens, parents, believed), stops)
    rest = []
    for (t, p, _), (all_t, all_p, all_c) in zip(parts(columns, ends), every, strict=True):
        check_shape(t, p)
        kept = set()
        for node in range(len(t)):
            line = [node]
            while p[line[0]] >= 0:
                line.insert(0, int(p[line[0]]))
            kept.add(walk(all_t, all_p, t[line].tolist())[-1])
        assert len(kept) == len(t)
        rest += [all_c[node] for node in range(len(all_t)) if node not in kept]
    np.testing.assert_array_equal(np.sort(rest), np.sort(believed)[: len(rest)])


@given(SEQUENCES, st.data())
def test_verification_and_agreement(sequences, data) -> None:
    drafts = [sequence[0][0] for sequence in sequences if sequence]
    sources = [[tree for tree, _ in sequence] for sequence in sequences if sequence]
    (tokens, parents, _), stops = end_to_end(drafts)
    lengths = [len(tree[0]) + 1 for tree in drafts]
    drawn = np.array(data.draw(st.lists(st.integers(0, 3), min_size=sum(lengths) + 2, max_size=sum(lengths) + 2)))
    rows = 2 + np.cumsum([0, *lengths[:-1]])[: len(drafts)]  # behind those of others
    paths, ends = verify_all(tokens, parents, stops, drawn, rows)
    columns, places = end_to_end([tree for trees in sources for tree in trees])
    counts = np.cumsum([len(trees) for trees in sources], dtype=np.int64)
    agreed = iter(agree_all(*columns[:2], places, counts, drawn, rows, paths, ends).tolist())
    for draft, trees, (path,), row in zip(drafts, sources, parts((paths,), ends), rows, strict=True):
        said = drawn[row:]
        alone = verify(draft[0], draft[1], said)
        np.testing.assert_array_equal(path, alone)
        for tree in trees:
            right, others = agreement(tree[0], tree[1], said[np.append(0, alone + 1)])
            assert next(agreed) == [right, int(others)]
