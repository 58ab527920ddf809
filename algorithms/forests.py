"""The draft trees of several sequences at once, one behind the other: sequence s has those from `stops[s - 1]` up to
`stops[s]`. What is done to each is in `trees`; here it is one call for all of them.

What K sources say of S sequences, the draft first, are trees as well: `columns` int32 `[3, N]` (tokens, parents, and
the bits of weights) and `ends` int64 `[K, S]`, source by source. What is remembered of the sequences are the rows
`slots` `[S]` of `records` (see `speculation`).
"""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np

from thornback.algorithms.compiled import compiled
from thornback.algorithms.speculation import belief, best_size, doubt, forget, learn, learn_belief, learn_rest, rate
from thornback.algorithms.trees import agreement, fuse, is_tree, likelihoods, verify

_LIKELY = 0.05  # retrieved branches whose first token a draft thinks so likely stay, whatever its other choices
_JUDGES = 0.6  # how often a draft must be right to judge what others say


@compiled
def are_trees(columns, stops, vocab_size):
    """Whether all of a source's trees can be verified (`is_tree`)."""
    start = 0
    for stop in stops:
        if stop < start or not is_tree(columns[0, start:stop], columns[1, start:stop], vocab_size):
            return False
        start = stop
    return start == columns.shape[1]


@compiled
def _bounds(ends, source, s):
    """Where a source's tree of a sequence begins and ends."""
    if s:
        return ends[source, s - 1], ends[source, s]
    return ends[source - 1, -1] if source else 0, ends[source, s]


@compiled
def fuse_all(columns, ends, matches, records, slots, scores, factors, num_nodes, max_depths):
    """What each sequence's sources say, as one tree (`fuse`). `matches` int64 `[K, S]`: the lengths of retrievals'
    matches, by which and by what is remembered their trees are doubted (`likelihoods`); the draft's weights are chances
    already.

    Where a draft has a tree, and is right often enough, it judges which retrieved branches stay: `scores` `[S, V]` and
    `factors` `[S, 3]` say what it holds of any next token (`scores` times the first, less the second, is the logarithm
    of its probability) and of the last of its own choices (the third). Returns tokens, parents, chances and stops
    `[S]` of the trees."""
    weights = columns[2].view(np.float32)
    size = columns.shape[1]
    found, above = np.empty(size, np.int32), np.empty(size, np.int32)
    chances, out_stops = np.empty(size, np.float32), np.empty(len(slots), np.int64)
    tokens, parents, likely = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.float32)
    stops, first = np.empty(len(ends), np.int64), np.empty(size, np.float32)
    end = 0
    for s in range(len(slots)):
        record = records[slots[s]]
        begin, stop = _bounds(ends, 0, s)
        judges = stop > begin and rate(record, 0) > _JUDGES
        at = 0
        for source in range(len(ends)):
            begin, stop = _bounds(ends, source, s)
            of = columns[0, begin:stop], columns[1, begin:stop], weights[begin:stop]
            to = at + stop - begin
            tokens[at:to], parents[at:to] = of[0], of[1]
            if source == 0:
                likely[at:to] = of[2]
            elif stop > begin:
                branches = 0
                if judges:
                    for i in range(begin, stop):
                        if columns[1, i] < 0:
                            score = scores[s, columns[0, i]] * factors[s, 0] - factors[s, 1]
                            first[branches] = np.exp(score)
                            branches += 1
                known = matches[source, s], doubt(record, source)
                likely[at:to] = likelihoods(*of, *known, first[:branches], min(factors[s, 2], _LIKELY))
            stops[source] = at = to
        tree = fuse(tokens[:at], parents[:at], likely[:at], stops, num_nodes, max_depths[s])
        begin, end = end, end + len(tree[0])
        found[begin:end], above[begin:end], chances[begin:end] = tree
        out_stops[s] = end
    return found[:end], above[:end], chances[:end], out_stops


@compiled
def join(columns, stops, matches):
    """The trees of K sources as this module takes them: of tuples of `TokenForest`s' arrays, `columns`, `ends` and the
    lengths of matches `[K, S]`."""
    size = 0
    for part in columns:
        size += part.shape[1]
    joined, ends = np.empty((3, size), np.int32), np.empty((len(stops), len(stops[0])), np.int64)
    lengths, start = np.empty_like(ends), 0
    for source in range(len(stops)):
        part = columns[source]
        joined[:, start : start + part.shape[1]] = part
        for s in range(ends.shape[1]):
            ends[source, s], lengths[source, s] = start + stops[source][s], matches[source][s]
        start += part.shape[1]
    return joined, ends, lengths


@compiled
def sizes_of(stops):
    """How many nodes each tree has, int64 `[S]`."""
    sizes = stops.copy()
    sizes[1:] -= stops[:-1]
    return sizes


@compiled
def promise_of(chances, stops, records, slots):
    """The accepted tokens that trees promise, all together."""
    total, start = 0.0, 0
    for s in range(len(stops)):
        factor = belief(records[slots[s]])
        for i in range(start, stops[s]):
            total += min(chances[i] * factor, 1.0)
        start = stops[s]
    return total


@compiled
def choose(tokens, parents, chances, stops, records, slots, num_sequences, num_tokens, seconds, sizes):
    """The best nodes of all trees together, as many as `best_size` says, where each sequence's chances are worth what
    they are believed to be. Returns trees as `fuse_all` does."""
    size, start = len(tokens), 0
    believed, owner = np.empty(size, np.float32), np.empty(size, np.int64)
    for s in range(len(stops)):
        factor = belief(records[slots[s]])
        for i in range(start, stops[s]):
            believed[i], owner[i] = min(chances[i] * factor, 1.0), s
        start = stops[s]
    order = np.argsort(-believed, kind="mergesort")
    kept = order[: best_size(believed[order], num_sequences, num_tokens, seconds, sizes)]
    # A child is never likelier than its parent, and comes after it: what is kept holds its own ancestors.
    kept = np.sort(kept)
    place, above, ends = np.full(size, -1, np.int32), np.empty(len(kept), np.int32), np.zeros(len(stops), np.int64)
    before, last = 0, -1
    for at in range(len(kept)):
        node, s = kept[at], owner[kept[at]]
        if s != last:
            before, last = at, s
        first = stops[s - 1] if s else 0
        place[node] = at - before
        above[at] = place[first + parents[node]] if parents[node] >= 0 else -1
        ends[s] += 1
    return tokens[kept], above, chances[kept], np.cumsum(ends)


@compiled
def chains(tokens, parents, chances, stops):
    """Of each tree the path from its root down of which most tokens are expected to be accepted, for who verifies no
    trees (ours). Returns trees as `fuse_all` does."""
    size = len(tokens)
    kept, worth, below = np.empty(size, np.int64), np.empty(size, np.float32), np.empty(size, np.int64)
    ends, start, end = np.empty(len(stops), np.int64), 0, 0
    for s in range(len(stops)):
        worth[start : stops[s]], below[start : stops[s]] = chances[start : stops[s]], -1
        best = -1
        for node in range(stops[s] - 1, start - 1, -1):  # children come after their parents
            if below[node] >= 0:
                worth[node] += worth[below[node]]
            if parents[node] < 0:
                if best < 0 or worth[node] >= worth[best]:
                    best = node
            elif below[start + parents[node]] < 0 or worth[node] >= worth[below[start + parents[node]]]:
                below[start + parents[node]] = node
        while best >= 0:
            kept[end], best = best, below[best]
            end += 1
        ends[s], start = end, stops[s]
    above = np.empty(end, np.int32)
    for s in range(len(stops)):
        begin = ends[s - 1] if s else 0
        above[begin : ends[s]] = np.arange(-1, ends[s] - begin - 1)
    return tokens[kept[:end]], above, chances[kept[:end]], ends


@compiled
def verify_all(tokens, parents, stops, drawn, rows):
    """The nodes of each tree that the target agrees with (`verify`), one path behind the other, and their stops `[S]`.
    What was drawn after sequence s's last token is at `rows[s]` of `drawn`; what was drawn after its nodes follows."""
    paths, ends = np.empty(len(tokens), np.int64), np.empty(len(stops), np.int64)
    start, size = 0, 0
    for s in range(len(stops)):
        path = verify(tokens[start : stops[s]], parents[start : stops[s]], drawn[rows[s] :])
        paths[size : size + len(path)] = path
        size += len(path)
        ends[s], start = size, stops[s]
    return paths[:size], ends


@compiled
def learn_all(columns, ends, records, slots, chances, stops, drawn, rows, paths, path_stops, accepted):
    """Remember what came of the trees of these sequences, with nodes of the given `chances` up to `stops` `[S]`: of
    each source how far it went along with what was said (`agreement`), and what was accepted of what was promised. What
    was drawn, and which nodes were right, are as in `verify_all`. Those without a tree forget. `accepted` int64: counts
    how many trees had an i-th node accepted."""
    first, start, said = 0, 0, np.empty(1, np.int64)
    for s in range(len(slots)):
        record, path = records[slots[s]], paths[first : path_stops[s]]
        if stops[s] > start:
            said = np.empty(1 + len(path), np.int64)
            said[0] = drawn[rows[s]]
            for i in range(len(path)):
                said[1 + i] = drawn[rows[s] + 1 + path[i]]
                accepted[i] += 1
            learn_belief(record, len(path), chances[start : stops[s]].sum())
            learn_rest(record, len(path))
        for source in range(len(ends)):
            begin, stop = _bounds(ends, source, s)
            if stops[s] == start:
                forget(record, source)
            elif stop > begin:
                of = columns[0, begin:stop], columns[1, begin:stop]
                right, others = agreement(*of, said)
                learn(record, source, right, 1.0 if others else 0.0)
        first, start = path_stops[s], stops[s]
