"""What is done to the trees of several sequences at once is what is done to each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.algorithms.test_trees import check_shape, fused, tries, walk
from thornback.algorithms import (
    agreement,
    are_trees,
    best_size,
    chains,
    choose,
    fuse_all,
    learn_all,
    likelihoods,
    promise_of,
    record_size,
    verify,
    verify_all,
)
from thornback.algorithms.speculation import belief, doubt, forget, learn, learn_belief, learn_rest, rate
from thornback.contracts import TokenForest, TokenTree

SIZES, SECONDS = np.array([1.0, 8.0, 64.0]), np.array([1.0, 1.5, 9.0])
SOURCES, VOCABULARY = 3, 4
EMPTY = (np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32))


@st.composite
def forests(draw):
    """Of up to 4 sequences what a draft and two retrievals say; what is known of them; and what the draft holds of
    each next token."""
    num = draw(st.integers(1, 4))
    sources = []
    for source in range(SOURCES):
        trees = []
        for _ in range(num):
            tokens, parents, weights, _ = draw(tries())
            if source == 0:
                weights = weights / max(weights.max(initial=1), 1)
            trees.append(TokenTree(tokens, parents, weights.astype(np.float32), 0 if source == 0 else len(tokens)))
        sources.append(trees)
    rng = np.random.default_rng(draw(st.integers(0, 100)))
    slots = rng.permutation(6)[:num]
    records = rng.uniform(0, 5, (6, record_size(SOURCES)))
    records[:, 3::2] += records[:, 2::2]  # tried more often than right
    scores = rng.normal(0, 2, (num, VOCABULARY)).astype(np.float32)
    factors = np.stack([np.ones(num), np.log(np.exp(scores).sum(-1)), rng.uniform(0, 0.2, num)], 1)
    return sources, records, slots, scores, factors


def together(sources):
    forests = [TokenForest.of(trees) for trees in sources]
    columns = np.concatenate([forest.columns for forest in forests], 1)
    starts = np.cumsum([0, *(forest.columns.shape[1] for forest in forests[:-1])])
    ends = np.stack([forest.stops for forest in forests]) + starts[:, None]
    return columns, ends, np.stack([forest.match_lengths for forest in forests])


def parts(columns, stops):
    return [tuple(c[a:b] for c in columns) for a, b in pairwise([0, *stops])]


def fused_all(drawn, num_nodes=10, max_depth=4):
    sources, records, slots, scores, factors = drawn
    depths = np.full(len(slots), max_depth)
    return fuse_all(*together(sources), records, slots, scores, factors, num_nodes, depths)


@given(forests())
def test_fusion(drawn) -> None:
    *columns, stops = fused_all(drawn)
    sources, records, slots, scores, factors = drawn
    for s, found in enumerate(parts(columns, stops)):
        record, trees = records[slots[s]], []
        judges = len(sources[0][s]) > 0 and rate(record, 0) > 0.6
        for source, of in enumerate(sources):
            tokens, parents, weights = of[s].tokens, of[s].parents, of[s].weights
            if source:
                first = np.exp(scores[s, tokens[parents < 0]] - factors[s, 1]).astype(np.float32)
                known = of[s].match_length, doubt(record, source)
                judged = first if judges else first[:0]
                weights = likelihoods(tokens, parents, weights, *known, judged, min(factors[s, 2], 0.05))
            trees.append((tokens, parents, weights))
        for mine, alone in zip(found, fused(*trees, num_nodes=10, max_depth=4), strict=True):
            np.testing.assert_allclose(mine, alone, rtol=1e-5)


@given(forests())
def test_the_best_chain_of_each(drawn) -> None:
    tokens, parents, chances, stops = fused_all(drawn)
    *columns, ends = chains(tokens, parents, chances, stops)
    every = parts((tokens, parents, chances), stops)
    for (t, p, c), (all_t, all_p, all_c) in zip(parts(columns, ends), every, strict=True):
        np.testing.assert_array_equal(p, np.arange(-1, len(t) - 1))
        lines = [[]]  # every path from the root down
        for node in range(len(all_t)):
            above = next(line for line in lines if (line[-1] if line else -1) == all_p[node])
            lines.append([*above, node])
        assert all_t[walk(all_t, all_p, t.tolist())].tolist() == t.tolist()
        np.testing.assert_allclose(c.sum(), max(all_c[line].sum() for line in lines), rtol=1e-5)


@given(forests())
def test_the_best_nodes_of_all_are_chosen(drawn) -> None:
    tokens, parents, chances, stops = fused_all(drawn)
    _, records, slots, _, _ = drawn
    beliefs = np.array([belief(records[slot]) for slot in slots])
    believed = np.minimum(chances * np.repeat(beliefs, np.diff(stops, prepend=0)).astype(np.float32), 1)
    np.testing.assert_allclose(promise_of(chances, stops, records, slots), believed.sum(), rtol=1e-5)
    number = len(slots)
    size = best_size(np.sort(believed)[::-1].copy(), number, number, SECONDS, SIZES)
    chosen = choose(tokens, parents, chances, stops, records, slots, number, number, SECONDS, SIZES)
    *columns, ends = chosen
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
    np.testing.assert_allclose(np.sort(rest), np.sort(believed)[: len(rest)], rtol=1e-5)


@given(forests(), st.data())
def test_what_was_said_is_verified_and_learned_from(drawn, data) -> None:
    sources, records, slots, _, _ = drawn
    tokens, parents, chances, stops = fused_all(drawn)
    lengths = np.diff(stops, prepend=0) + 1
    size = int(lengths.sum()) + 2
    said = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    rows = 2 + np.cumsum([0, *lengths[:-1]])  # behind those of others
    paths, ends = verify_all(tokens, parents, stops, said, rows)
    columns, places, _ = together(sources)
    known, accepted = records.copy(), np.zeros(10, np.int64)
    learn_all(columns, places, known, slots, chances, stops, said, rows, paths, ends, accepted)
    every = parts((tokens, parents, chances), stops)
    counts = np.zeros(10, np.int64)
    for s, ((t, p, c), (path,)) in enumerate(zip(every, parts((paths,), ends), strict=True)):
        of_this, record = said[rows[s] :], records[slots[s]].copy()
        np.testing.assert_array_equal(path, verify(t, p, of_this))
        counts[: len(path)] += 1
        if len(t):
            learn_belief(record, len(path), c.sum())
            learn_rest(record, len(path))
        for source, trees in enumerate(sources):
            if not len(t):
                forget(record, source)
            elif len(trees[s]):
                of, heard = (trees[s].tokens, trees[s].parents), of_this[np.append(0, path + 1)]
                right, others = agreement(*of, heard)
                learn(record, source, right, float(others))
        np.testing.assert_allclose(known[slots[s]], record, rtol=1e-6)
    np.testing.assert_array_equal(accepted, counts)
    untouched = np.setdiff1d(np.arange(len(records)), slots)
    np.testing.assert_array_equal(known[untouched], records[untouched])


def test_trees_that_no_pass_can_verify_are_told_apart() -> None:
    def valid(*trees: tuple[list[int], list[int]]) -> bool:
        forest = TokenForest.of([TokenTree(*(np.array(x, np.int32) for x in t), np.ones(len(t[0]))) for t in trees])
        return are_trees(forest.columns, forest.stops, 5)

    right = ([1, 2], [-1, 0])
    assert valid()
    assert valid(right, ([], []), right)
    assert not valid(right, ([5], [-1]))
    assert not valid(right, ([-1], [-1]))
    assert not valid(right, ([1, 2], [-1, 1]))
    assert not valid(right, ([1, 2], [-2, 0]))
    forest = TokenForest.of([TokenTree(*EMPTY)])
    assert not are_trees(np.zeros((3, 2), np.int32), forest.stops, 5)  # nodes of nobody
