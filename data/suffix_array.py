"""Token sequences in the order of what follows each place, and what followed a context (RASD, papers.md section 3).

A store holds documents end to end, each closed by `END`. Its suffix array sorts all places by the next `DEPTH` tokens:
a match is never longer, so that nothing beyond needs an order.
"""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from thornback.contracts import TokenTree

DEPTH = 16
# numba refuses to keep what it compiled where it may not write.
_KEEP = any(os.access(place, os.W_OK) for place in (os.path.dirname(__file__), os.path.expanduser("~")))
_OPTIONS: dict[str, Any] = {"cache": _KEEP, "nogil": True}
END = np.uint32(0xFFFFFFFF)  # no token; sorts behind all of them


def join(documents: Sequence[np.ndarray]) -> np.ndarray:
    """uint32 `[T]`: every document's tokens and an `END`."""
    parts = [np.append(np.asarray(document, np.uint32), END) for document in documents if len(document)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def sort_places(tokens: np.ndarray) -> np.ndarray:
    """uint32 `[T]`: the places of `tokens` `[T]` in the order of the `DEPTH` tokens from each on, by doubling: places
    sorted by n tokens are sorted by 2n when each is joined with the rank of the place n further on."""
    if len(tokens) >= 1 << 31:
        raise ValueError(f"A suffix array holds fewer than 2**31 tokens, not {len(tokens)}; split them over several.")
    rank = tokens.astype(np.int64) + 1
    ends = tokens == END
    rank[ends] = 1 + rank[~ends].max(initial=0)
    width = 1
    while True:
        after = np.zeros_like(rank)
        after[:-width] = rank[width:] if len(rank) > width else 0
        key = rank << 32 | after
        order = np.argsort(key, kind="stable")
        ordered = key[order]
        width *= 2
        if width >= DEPTH:
            return order.astype(np.uint32)
        rank[order] = np.cumsum(np.append(0, ordered[1:] != ordered[:-1])) + 1


@njit(**_OPTIONS)
def _compare(tokens, place, context, start):
    """Whether the tokens from `place` on come before (-1), begin with (0) or come after (1) `context[start:]`."""
    for i in range(len(context) - start):
        if place + i >= len(tokens):
            return -1
        a, b = np.int64(tokens[place + i]), np.int64(context[start + i])
        if a != b:
            return -1 if a < b else 1
    return 0


@njit(**_OPTIONS)
def _bound(tokens, order, context, start, upper):
    """The first place in `order` that does not come before what matches `context[start:]`, or, `upper`, after it."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        side = _compare(tokens, order[middle], context, start)
        if side < 0 or (upper and side == 0):
            low = middle + 1
        else:
            high = middle
    return low


@njit(**_OPTIONS)
def longest_match(tokens, order, context, min_match, max_match):
    """How many of the last tokens of `context` occur together, between the two bounds, or 0; and the range of `order`
    where they do. What occurs with n tokens occurs with n - 1, so that n is found by bisection."""
    found, first = 0, 0
    low, high = min_match, min(max_match, len(context))
    while low <= high:
        n = (low + high + 1) // 2
        at = _bound(tokens, order, context, len(context) - n, False)
        if at < len(order) and _compare(tokens, order[at], context, len(context) - n) == 0:
            found, first, low = n, at, n + 1
        else:
            high = n - 1
    if found == 0:
        return 0, 0, 0
    return found, first, _bound(tokens, order, context, len(context) - found, True)


@njit(**_OPTIONS)
def continuations(tokens, order, first, last, match, count, length):
    """int64 `[min(count, last - first), length]`: what follows the match at places spread evenly over the range; -1
    behind a document's end."""
    number = min(count, last - first)
    out = np.full((number, length), -1, np.int64)
    for row in range(number):
        place = np.int64(order[first + row * (last - first) // number]) + match
        for i in range(length):
            if place + i >= len(tokens) or tokens[place + i] == END:
                break
            out[row, i] = tokens[place + i]
    return out


@njit(**_OPTIONS)
def earlier(context, min_match, max_match, count, length):
    """As `continuations`, of the places in `context` itself where the most of its last tokens occurred before, the
    latest first; and how many those are, or 0."""
    size, longest, number = len(context), min_match - 1, 0
    places = np.empty(count, np.int64)
    for place in range(size - 1, 0, -1):  # the first token after a match
        match = 0
        while match < min(max_match, place) and context[place - 1 - match] == context[size - 1 - match]:
            match += 1
        if match > longest:
            longest, number = match, 0
        if match == longest and match >= min_match and number < count:
            places[number] = place
            number += 1
    out = np.full((number, length), -1, np.int64)
    for row in range(number):
        for i in range(length):
            at = places[row] + i
            if at >= size:
                break
            out[row, i] = context[at]
    return out, longest if number else 0


@njit(**_OPTIONS)
def _merge(paths, weights):
    """A trie of the rows of `paths`, each of its weight: tokens, parents, weights, depths."""
    room = paths.size
    tokens, parents = np.empty(room, np.int32), np.empty(room, np.int32)
    total, depth = np.zeros(room, np.float32), np.empty(room, np.int32)
    child, sibling = np.full(room + 1, -1, np.int32), np.full(room, -1, np.int32)
    size = 0
    for row in range(len(paths)):
        node = -1
        for i in range(paths.shape[1]):
            token = paths[row, i]
            if token < 0:
                break
            below = child[node + 1]
            while below >= 0 and tokens[below] != token:
                below = sibling[below]
            if below < 0:
                below = size
                tokens[below], parents[below], depth[below] = token, node, i
                sibling[below], child[node + 1] = child[node + 1], below
                size += 1
            total[below] += weights[row]
            node = below
    return tokens[:size], parents[:size], total[:size], depth[:size]


def merge(paths: np.ndarray, weights: np.ndarray, num_nodes: int, match_length: int) -> TokenTree:
    """The `num_nodes` heaviest nodes of the trie of `paths` int64 `[P, L]` (-1 behind an end) with `weights` `[P]`."""
    tokens, parents, total, depth = _merge(paths, weights)
    # A node weighs no more than its parent, which stands less deep, so that the heaviest bring their ancestors.
    kept = np.sort(np.lexsort((depth, -total))[:num_nodes])
    place = np.full(len(tokens) + 1, -1, np.int32)
    place[kept] = np.arange(len(kept))
    return TokenTree(tokens[kept], place[parents[kept]], total[kept], match_length)
