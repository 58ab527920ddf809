"""Draft trees: what pruning keeps, what fusion joins, what verification accepts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thornback.algorithms import agreement, ancestor_bits, depths, fuse, likelihoods, verify

ALL = 1 << 20
NOTHING = np.empty(0, np.float32)


def trie_of(paths):
    """Tokens, parents, and the number of paths through each node."""
    known, counts = {}, []
    for path in paths:
        node = -1
        for token in path:
            if (node, token) not in known:
                known[node, token] = len(counts)
                counts.append(0)
            node = known[node, token]
            counts[node] += 1
    tokens, parents = [t for _, t in known], [p for p, _ in known]
    return np.array(tokens, np.int32), np.array(parents, np.int32), np.array(counts, np.float32)


@st.composite
def tries(draw):
    """A trie of random sequences, and these."""
    paths = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=5))
    return (*trie_of(paths), paths)


def fused(*trees, num_nodes=ALL, max_depth=ALL):
    columns = [np.concatenate(column) for column in zip(*trees, strict=True)]
    return fuse(*columns, np.cumsum([len(tree[0]) for tree in trees]), num_nodes, max_depth)


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
    trees = [(t, p, w / (1 + w[p < 0].sum())) for t, p, w, _ in (one, other)]
    tokens, parents, likely = fused(*trees)
    check_shape(tokens, parents)
    paths = one[3] + other[3]
    for path in paths:
        assert len(walk(tokens, parents, path)) == len(path)
    assert len(tokens) == len({tuple(path[: i + 1]) for path in paths for i in range(len(path))})
    for path in paths:  # right where any source is, if they err independently; but behind a node they come to 1 at most
        wanted = 1.0
        for n in range(1, len(path) + 1):
            held = [behind(tree, path[: n - 1]) for tree in trees]
            right = {token: 1 - np.prod([1 - of.get(token, 0.0) for of in held]) for token in {*held[0], *held[1]}}
            wanted *= right[path[n - 1]] / max(sum(right.values()), 1.0)
        assert likely[walk(tokens, parents, path)[-1]] == pytest.approx(wanted, abs=1e-5)


def behind(tree, path):
    """What a tree holds of each token behind a path."""
    tokens, parents, chances = tree
    nodes = walk(tokens, parents, path)
    if len(nodes) < len(path):
        return {}
    node, above = (nodes[-1], chances[nodes[-1]]) if nodes else (-1, 1.0)
    return {int(tokens[i]): float(chances[i] / above) for i in np.flatnonzero(parents == node)}


def test_sources_that_disagree_share_what_there_is() -> None:
    one = (np.array([1, 2], np.int32), np.array([-1, 0], np.int32), np.array([0.9, 0.45], np.float32))
    other = (np.array([1, 3, 2], np.int32), np.array([-1, -1, 0], np.int32), np.array([0.5, 0.4, 0.25], np.float32))
    tokens, _, likely = fused(one, other)
    assert tokens.tolist() == [1, 2, 3]
    np.testing.assert_allclose(likely, [0.95 / 1.35, 0.95 / 1.35 * 0.75, 0.4 / 1.35], rtol=1e-6)


@given(tries(), tries(), st.integers(0, 12), st.integers(1, 5))
def test_pruning_keeps_the_likeliest_with_their_ancestors(one, other, num_nodes, max_depth) -> None:
    trees = [(t, p, w / (1 + w.max(initial=0))) for t, p, w, _ in (one, other)]
    every = fused(*trees, max_depth=max_depth)
    tokens, parents, likely = fused(*trees, num_nodes=num_nodes, max_depth=max_depth)
    check_shape(tokens, parents)
    assert len(tokens) == min(num_nodes, len(every[0]))
    assert depths(parents).max(initial=0) <= max_depth
    np.testing.assert_allclose(np.sort(likely), np.sort(every[2])[len(every[2]) - len(likely) :])


@given(tries(), st.integers(0, 16), st.floats(0.0, 8.0))
def test_a_nodes_chance_is_its_share_less_a_doubt(trie, match_length, doubt) -> None:
    tokens, parents, counts, paths = trie
    likely = likelihoods(tokens, parents, counts, match_length, doubt, NOTHING, 0.0)
    agreed = (match_length or 8) + depths(parents) - 1
    for i, parent in enumerate(parents):
        above, among = (1.0, len(paths)) if parent < 0 else (likely[parent], counts[parent])
        doubted = min(0.97, np.exp((1 - agreed[i]) / 7) * among**-0.1 * doubt)
        assert likely[i] == pytest.approx(above * counts[i] / among * (1 - doubted), rel=1e-5)


def test_what_was_found_behind_many_tokens_or_many_times_is_believed_more() -> None:
    chain, parents = np.arange(4, dtype=np.int32), np.arange(-1, 3, dtype=np.int32)

    def chances(match_length, count, doubt=1.0):
        return likelihoods(chain, parents, np.full(4, count, np.float32), match_length, doubt, NOTHING, 0.0)

    assert chances(2, 1)[0] < 0.2 < 0.9 < chances(16, 1)[3] / chances(16, 1)[2]
    assert chances(4, 20)[0] > chances(4, 1)[0] > chances(4, 1, doubt=1.5)[0] > 0


@given(tries(), st.data())
def test_the_draft_prunes_branches(trie, data) -> None:
    tokens, parents, counts, _ = trie
    heads = np.flatnonzero(parents < 0)
    first = np.array([data.draw(st.sampled_from([0.01, 0.3])) for _ in heads], np.float32)
    likely = likelihoods(tokens, parents, counts, 16, 0.0, first, 0.1)
    kept = {int(tokens[head]) for head, chance in zip(heads, first, strict=True) if chance >= 0.1}
    left, above, _ = fused((tokens, parents, likely))
    assert {int(t) for t in left[above < 0]} == kept
    whole = [i for i in range(len(tokens)) if likely[i] > 0]
    np.testing.assert_array_equal(np.sort(left), np.sort(tokens[whole]))


@given(tries(), st.lists(st.integers(0, 3), max_size=6))
def test_agreement_is_how_far_a_tree_goes_along(trie, said) -> None:
    tokens, parents, _, _ = trie
    right, others = agreement(tokens, parents, np.array(said, np.int64))
    path = walk(tokens, parents, said)
    assert right == len(path)
    end = path[-1] if path else -1
    assert others == (right < len(said) and bool((parents == end).any()))


def _line(parents, node):
    while node >= 0:
        yield node
        node = parents[node]


@given(tries(), st.data())
def test_verification_follows_what_the_target_draws(trie, data) -> None:
    tokens, parents, _, _ = trie
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens) + 1, max_size=len(tokens) + 1))
    path = verify(tokens, parents, np.array(drawn)).tolist()
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
    with pytest.raises(ValueError, match="more nodes than the 63"):
        ancestor_bits(np.arange(64) - 1)
