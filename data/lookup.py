"""What followed a context, looked up in one compiled call (RASD, papers.md section 3).

The continuations of all places where the longest match occurs are read, or, of many, of about `SHARE`: those whose
place draws a low number. So what is read depends on the documents and their order alone, not on how they are spread
over segments; to be found quickly, low numbers have suffix arrays of their own (`thin`).
"""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from thornback.algorithms.compiled import compiled
from thornback.contracts import TokenTree
from thornback.data.suffix_array import DEPTH, END

SHARE = 64  # matches that are read
LEVELS = 3  # suffix arrays of a segment, each thinner by SHARE
SHORTEST = 2  # tokens of a match
LENGTH = 32  # tokens of a continuation that are read, at most; and at most as many as a tree has nodes


@compiled
def _number(place):
    """A number below 2**32 for a place, as if drawn at random (the mixer of splitmix64)."""
    x = np.uint64(place) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((x ^ (x >> np.uint64(31))) >> np.uint64(32))


@compiled
def thin(order, start, level):
    """uint32: of a suffix array the places whose number is among the lowest, one in `SHARE**level`. The segment's first
    token is the store's token `start`."""
    bound = (np.int64(1) << 32) // SHARE**level
    kept = 0
    for i in range(len(order)):
        kept += _number(start + np.int64(order[i])) < bound
    out = np.empty(kept, np.uint32)
    kept = 0
    for i in range(len(order)):
        if _number(start + np.int64(order[i])) < bound:
            out[kept] = order[i]
            kept += 1
    return out


@compiled
def look_up(table, context, num_nodes):
    """What followed the longest match of the last `DEPTH` to `SHORTEST` tokens of `context` int64: a tree's columns
    (`tree_of`), and the length of the match.

    `table` int64 `[S, 3 + 2 * LEVELS]` has a row for each segment: the address and number of its tokens, which of the
    store's tokens its first one is, and the addresses and lengths of its suffix arrays.
    """
    num_segments = len(table)
    match, found = 0, np.zeros((num_segments, 3), np.int64)  # of each segment: match, range of the suffix array
    for s in range(num_segments):
        tokens, order = _array(table, s, 0), _array(table, s, 3)
        found[s] = _longest_match(tokens, order, context, max(match, SHORTEST))
        match = max(match, found[s, 0])
    total = 0
    for s in range(num_segments):
        if match and found[s, 0] == match:
            total += found[s, 2] - found[s, 1]
    level, step = 0, SHARE
    while level + 1 < LEVELS and total >= step * SHARE:
        level, step = level + 1, step * SHARE
    length = min(num_nodes, LENGTH)
    room = min(total, 4 * SHARE)
    paths, places, read = np.empty((room, length), np.int64), np.empty(room, np.int64), 0
    for s in range(num_segments):
        if match and found[s, 0] == match:
            tokens, order = _array(table, s, 0), _array(table, s, 3 + 2 * level)
            first, last = found[s, 1], found[s, 2]
            if level:
                start = len(context) - match
                first = _bound(tokens, order, context, start, 0, False)
                last = _bound(tokens, order, context, start, first, True)
            for i in range(first, last):
                place = table[s, 2] + np.int64(order[i])
                if read < room and (total <= SHARE or _number(place) * total < SHARE << 32):
                    _read(tokens, np.int64(order[i]) + match, paths[read])
                    places[read] = place
                    read += 1
    return _grow(paths[:read], places, num_nodes, total / max(read, 1)), match


@compiled
def look_back(context, num_nodes):
    """The same, of `context` int64 itself: what followed the same tokens earlier in it, the last `SHARE` times."""
    size = len(context)
    match, read = SHORTEST - 1, 0
    places = np.empty(SHARE, np.int64)
    last, second = context[size - 1], context[size - 2] if size > 1 else context[size - 1]
    for place in range(size - 1, 1, -1):  # the first token after a match
        if context[place - 1] != last or context[place - 2] != second:
            continue
        n = SHORTEST
        while n < min(DEPTH, place) and context[place - 1 - n] == context[size - 1 - n]:
            n += 1
        if n > match:
            match, read = n, 0
        if n == match and read < SHARE:
            places[read] = place
            read += 1
    paths = np.full((read, min(num_nodes, LENGTH)), -1, np.int64)
    for row in range(read):
        for i in range(min(paths.shape[1], size - places[row])):
            paths[row, i] = context[places[row] + i]
    return _grow(paths, places, num_nodes, 1.0), match if read else 0


@compiled
def look_up_all(table, tokens, stops, num_nodes):
    """`look_up` for each of the contexts that lie one behind the other in `tokens` int64, up to `stops` `[S]`: all
    trees' columns int32 `[3, N]`, where each ends, and the lengths of the matches, int64 `[2, S]`."""
    columns, ends = np.empty((3, len(stops) * num_nodes), np.int32), np.empty((2, len(stops)), np.int64)
    start, size = 0, 0
    for s in range(len(stops)):
        tree, ends[1, s] = look_up(table, tokens[max(start, stops[s] - DEPTH) : stops[s]], num_nodes)
        columns[:, size : size + tree.shape[1]] = tree
        size += tree.shape[1]
        ends[0, s], start = size, stops[s]
    return columns[:, :size].copy(), ends


@compiled
def look_back_all(tokens, stops, num_nodes):
    """`look_back` for each context, likewise."""
    columns, ends = np.empty((3, len(stops) * num_nodes), np.int32), np.zeros((2, len(stops)), np.int64)
    start, size = 0, 0
    for s in range(len(stops)):
        if stops[s] > start:
            tree, ends[1, s] = look_back(tokens[start : stops[s]], num_nodes)
            columns[:, size : size + tree.shape[1]] = tree
            size += tree.shape[1]
        ends[0, s], start = size, stops[s]
    return columns[:, :size].copy(), ends


def tree_of(columns: np.ndarray, match_length: int) -> TokenTree:
    """`columns` int32 `[3, N]`: tokens, parents and the bits of weights. One array is handed over faster than three."""
    return TokenTree(columns[0], columns[1], columns[2].view(np.float32), match_length)


@intrinsic
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint32)(types.int64), generate


@compiled
def _array(table, row, column):
    """The uint32 array whose address and length stand there."""
    return carray(_pointer(table[row, column]), table[row, column + 1])  # type: ignore[call-arg]


@compiled
def _compare(tokens, place, context, start):
    """Whether the tokens from `place` on come before (-1), begin with (0) or come after (1) `context[start:]`."""
    for i in range(len(context) - start):
        if place + i >= len(tokens):  # in a damaged file
            return -1
        a, b = np.int64(tokens[place + i]), context[start + i]
        if a != b:
            return -1 if a < b else 1
    return 0


@compiled
def _bound(tokens, order, context, start, low, upper):
    """The first in `order`, from `low` on, that does not come before what matches `context[start:]`, or, `upper`, that
    comes after it."""
    high = len(order)
    while low < high:
        middle = (low + high) // 2
        side = _compare(tokens, np.int64(order[middle]), context, start)
        if side < 0 or (upper and side == 0):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _longest_match(tokens, order, context, shortest):
    """How many of the last tokens of `context` occur together, `shortest` to `DEPTH`, or 0; and the range of `order`
    where they do. What occurs with n tokens occurs with n - 1, so that n is found by bisection."""
    size = len(context)
    found, first = 0, 0
    low, high = shortest, min(DEPTH, size)
    while low <= high:
        n = (low + high + 1) // 2
        at = _bound(tokens, order, context, size - n, 0, False)
        if at < len(order) and _compare(tokens, np.int64(order[at]), context, size - n) == 0:
            found, first, low = n, at, n + 1
        else:
            high = n - 1
    return found, first, _bound(tokens, order, context, size - found, first, True) if found else 0


@compiled
def _read(tokens, place, path):
    """Fill `path` with the tokens from `place` on, and with -1 behind the document's end."""
    for i in range(len(path)):
        if place + i >= len(tokens) or tokens[place + i] == END:
            path[i:] = -1
            return
        path[i] = tokens[place + i]


@compiled
def _grow(paths, places, num_nodes, weight):
    """The `num_nodes` heaviest nodes of the trie of `paths` int64 `[P, L]` (-1 behind an end), which were found at
    `places` `[P]`, each of that `weight`: int32 `[3, N]`, tokens, parents, and, as the bits of float32, weights.

    The heaviest node that is in sight comes next, of equals the shallowest, of these the one that was seen last; and it
    brings its children in sight. Those in sight share no path, so that there are never more of them than paths, and
    each was seen last at another place.
    """
    num_paths, length = paths.shape
    limit = min(num_nodes, num_paths * length)
    out = np.empty((3, limit), np.int32)
    tokens, parents, weights = out[0], out[1], out[2].view(np.float32)
    sight = np.empty((6, num_paths), np.int64)
    token, parent, count, depth, latest, head = sight[0], sight[1], sight[2], sight[3], sight[4], sight[5]
    following = np.arange(-1, num_paths - 1)  # of each path, the next one through the same node; from the last
    size, kept = 0, 0
    path, above, level = num_paths - 1, -1, 0
    while True:
        start = size
        while path >= 0:  # the children of what came last
            after, said = following[path], paths[path, level] if level < length else -1
            if said >= 0:
                node = start
                while node < size and token[node] != said:
                    node += 1
                if node == size:
                    token[node], parent[node], depth[node] = said, above, level
                    count[node], latest[node], head[node] = 0, -1, -1
                    size += 1
                count[node] += 1
                latest[node] = max(latest[node], places[path])
                following[path], head[node] = head[node], path
            path = after
        if size == 0 or kept == limit:
            break
        best = 0
        for node in range(1, size):
            lead = (count[node] - count[best]) * (LENGTH + 1) + depth[best] - depth[node]
            if lead > 0 or (lead == 0 and latest[node] > latest[best]):
                best = node
        tokens[kept], parents[kept], weights[kept] = token[best], parent[best], count[best] * weight
        path, above, level = head[best], kept, depth[best] + 1
        kept += 1
        size -= 1
        sight[:, best] = sight[:, size]
    return out[:, :kept]
