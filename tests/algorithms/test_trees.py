"""Draft trees: what pruning keeps, what fusion joins, what verification accepts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import ancestor_bits, depths, fuse, prune, subtree, verify


@st.composite
def tries(draw, max_nodes: int = 20):
    """A trie of random sequences, with the number of sequences through each node."""
    paths = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=0, max_size=max_nodes // 4))
    return (*fuse([(np.asarray(p), np.arange(len(p)) - 1, np.ones(len(p))) for p in paths]), paths)


def walk(tokens, parents, path):
    """The nodes along a path of tokens, as far as it goes."""
    node, found = -1, []
    for token in path:
        below = [i for i in range(len(tokens)) if parents[i] == node and tokens[i] == token]
        if not below:
            break
        node = below[0]
        found.append(node)
    return found


def check_shape(tokens, parents):
    assert all(parent < i for i, parent in enumerate(parents))
    assert len({(p, t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)}) == len(tokens)


@given(tries(), tries())
def test_fusion_holds_every_path_once(one, other) -> None:
    tokens, parents, weights = fuse([one[:3], other[:3]])
    check_shape(tokens, parents)
    paths = one[3] + other[3]
    for path in paths:
        assert len(walk(tokens, parents, path)) == len(path)
    for node, weight in enumerate(weights):
        assert weight == sum(node in walk(tokens, parents, path) for path in paths)
    assert len(tokens) == len({tuple(path[: i + 1]) for path in paths for i in range(len(path))})
    np.testing.assert_array_equal(tokens[: len(one[0])], one[0])  # the first tree keeps its places


@given(tries(), st.integers(0, 12))
def test_pruning_keeps_the_most_frequent_with_their_ancestors(trie, num_nodes) -> None:
    tokens, parents, counts, _ = trie
    kept = prune(tokens, parents, counts, num_nodes)
    assert len(kept) == min(num_nodes, len(tokens))
    assert set(parents[kept]) <= {-1, *kept}
    left = np.setdiff1d(np.arange(len(tokens)), kept)
    assert not len(left) or not len(kept) or counts[left].max() <= counts[kept].min()
    check_shape(*subtree(tokens, parents, kept))


@given(tries(), st.integers(1, 12), st.integers(1, 4))
def test_pruning_asks_the_draft_first(trie, num_nodes, top_k) -> None:
    tokens, parents, counts, _ = trie
    first = np.array([0.5, 0.1, 0.3, 0.1 - 1e-3], np.float32)
    kept = prune(tokens, parents, counts, num_nodes, first, top_k)
    assert set(parents[kept]) <= {-1, *kept}
    likely = {0, 2, 1, 3} if top_k == 4 else {0: set(), 1: {0}, 2: {0, 2}, 3: {0, 2, 1}}[top_k]
    assert {int(t) for t in tokens[kept[parents[kept] < 0]]} <= likely
    below = prune(tokens, parents, counts, num_nodes, first, 1, min_p=0.3)
    assert {int(t) for t in tokens[below[parents[below] < 0]]} <= {0, 2}


def test_the_score_is_the_drafts_chance_times_the_share() -> None:
    tokens, parents, _ = fuse([(np.array(p), np.arange(len(p)) - 1, np.ones(2)) for p in ([0, 1], [0, 2], [1, 1])])
    counts = np.array([10.0, 6.0, 4.0, 100.0, 90.0])  # 0, 0-1, 0-2, 1, 1-1
    first = np.array([0.8, 0.2, 0.0])
    # scores: .8, .48, .32, .2, .18
    assert prune(tokens, parents, counts, 3, first).tolist() == [0, 1, 2]
    assert prune(tokens, parents, counts, 3).tolist() == [0, 3, 4]


@given(tries(), st.data())
def test_verification_follows_what_the_target_draws(trie, data) -> None:
    tokens, parents, _, _ = trie
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens) + 1, max_size=len(tokens) + 1))
    path = verify(tokens, parents, drawn)
    emitted = [drawn[0], *(drawn[node + 1] for node in path)]
    assert (
        walk(tokens, parents, emitted) == path
    )  # every accepted node carries what was drawn before it, and no more is there
    assert depths(parents)[path].tolist() == list(range(1, len(path) + 1))


@given(tries())
def test_a_node_sees_its_ancestors_and_itself(trie) -> None:
    _, parents, _, _ = trie
    for i, bits in enumerate(ancestor_bits(parents).tolist()):
        seen, node = {0}, i - 1
        while node >= 0:
            seen.add(node + 1)
            node = parents[node]
        assert {b for b in range(64) if bits >> b & 1} == seen


def test_a_tree_that_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="64 nodes, but at most 63"):
        ancestor_bits(np.arange(64) - 1)
