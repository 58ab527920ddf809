"""The places of token sequences in the order of what follows each (RASD, papers.md section 3).

A store holds documents end to end, each closed by `END`. Its suffix array sorts all places by the next `DEPTH` tokens,
or those up to the document's end, and equal ones by place. A match is never longer, so nothing beyond needs an order.
"""

# mypy: disable-error-code="no-untyped-def, misc, assignment"
from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from thornback.algorithms.compiled import compiled

DEPTH = 16
END = np.uint32(0xFFFFFFFF)  # no token; sorts behind all of them
_MOST = 1 << 31


def join(documents: Iterable[np.ndarray]) -> np.ndarray:
    """uint32 `[T]`: every document's tokens and an `END`. Documents without tokens are left out."""
    parts = [np.append(np.asarray(document, np.uint32), END) for document in documents if len(document)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def sort_places(tokens: np.ndarray) -> np.ndarray:
    """uint32 `[T]`: the suffix array of `tokens` `[T]`, by doubling (Manber and Myers, 1993): where places are sorted
    by n tokens, those n before them are sorted by their second n, and one pass over their first n sorts them by 2n."""
    if len(tokens) >= _MOST:
        raise ValueError(f"A suffix array holds fewer than 2**31 tokens, not {len(tokens)}; split them over several.")
    keys = tokens.astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(len(tokens), dtype=np.uint64)
    keys.sort()
    order = keys.astype(np.uint32)  # the lower half: places
    del keys
    if len(order):
        _double(np.ascontiguousarray(tokens), order)
    return order


@compiled
def _double(tokens, order):
    """Sort `order`, which is sorted by one token, by `DEPTH` of them, in place."""
    size = len(tokens)
    left = np.empty(size, np.uint8)  # tokens up to the document's end, or DEPTH
    reach = 0
    for place in range(size - 1, -1, -1):
        reach = 1 if tokens[place] == END else min(reach + 1, DEPTH)
        left[place] = reach
    rank = np.empty(size, np.uint32)  # where in the order the places that begin alike begin
    head = 0
    for i in range(size):
        if i and tokens[order[i]] != tokens[order[i - 1]]:
            head = i
        rank[order[i]] = head
    following = np.empty(size, np.uint32)
    free = np.empty(size, np.uint32)  # of each rank, where its next place goes
    width = 1
    while width < DEPTH:
        for i in range(size):
            free[i] = i
        for place in range(size):
            if left[place] <= width:  # nothing follows
                following[free[rank[place]]] = place
                free[rank[place]] += 1
        for i in range(size):
            place = np.int64(order[i]) - width
            if place >= 0 and left[place] > width:
                following[free[rank[place]]] = place
                free[rank[place]] += 1
        head, before, before_next = 0, np.int64(-1), np.int64(-1)
        for i in range(size):
            place = following[i]
            own = np.int64(rank[place])
            then = np.int64(rank[place + width]) if left[place] > width else np.int64(-1)
            if own != before or then != before_next:
                head, before, before_next = i, own, then
            free[i] = head
        for i in range(size):
            order[i] = following[i]
            rank[following[i]] = free[i]
        width *= 2


@compiled
def merge_orders(tokens, first, second):
    """uint32 `[T]`: the suffix array of `tokens` `[T]`, of whose beginning `first` is the suffix array, and `second` of
    the rest, from which it counts places."""
    order = np.empty(len(tokens), np.uint32)
    shift, a, b = len(first), 0, 0
    for i in range(len(order)):
        if b == len(second) or (a < len(first) and not _after(tokens, first[a], shift + np.int64(second[b]))):
            order[i] = first[a]
            a += 1
        else:
            order[i] = shift + np.int64(second[b])
            b += 1
    return order


@compiled
def _after(tokens, one, other):
    """Whether what begins at `one` comes behind what begins at `other`."""
    for i in range(DEPTH):
        if tokens[one + i] != tokens[other + i]:
            return tokens[one + i] > tokens[other + i]
        if tokens[one + i] == END:
            return False
    return False
