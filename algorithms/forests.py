"""The draft trees of several sequences at once, one behind the other: sequence s has those from `stops[s - 1]` up to
`stops[s]`. What is done to each is in `trees`; here it is one call for all of them."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np

from thornback.algorithms.compiled import compiled
from thornback.algorithms.speculation import best_size
from thornback.algorithms.trees import agreement, fuse, likelihoods, verify


@compiled
def fuse_all(tokens, parents, weights, matches, doubts, sources, stops, num_nodes, max_depths):
    """What each sequence's sources say, as one tree (`fuse`). Sources end at `sources` `[R]`, and sequence s has those
    up to `stops[s]`; `matches` and `doubts` `[R]`: the length of its match and how much it is to be doubted
    (`likelihoods`); a negative length: `weights` are chances already. Returns tokens, parents, chances and stops `[S]`
    of the trees."""
    found, above = np.empty(len(tokens), np.int32), np.empty(len(tokens), np.int32)
    chances, ends = np.empty(len(tokens), np.float32), np.empty(len(stops), np.int64)
    unknown = np.empty(0, np.float32)
    start, source, size = 0, 0, 0
    for s in range(len(stops)):
        first, first_source = start, source
        while source < stops[s]:
            stop = sources[source]
            if matches[source] >= 0:
                of = tokens[start:stop], parents[start:stop], weights[start:stop]
                weights[start:stop] = likelihoods(*of, matches[source], doubts[source], unknown, 0.0)
            start, source = stop, source + 1
        of = tokens[first:start], parents[first:start], weights[first:start]
        tree = fuse(*of, sources[first_source:source] - first, num_nodes, max_depths[s])
        end = size + len(tree[0])
        found[size:end], above[size:end], chances[size:end] = tree
        ends[s] = size = end
    return found[:size], above[:size], chances[:size], ends


@compiled
def choose(tokens, parents, chances, stops, beliefs, num_sequences, num_tokens, seconds, sizes):
    """The best nodes of all trees together, as many as `best_size` says, where each sequence's chances are worth
    `beliefs` `[S]` of what they seem. Returns trees as `fuse_all` does."""
    size, start = len(tokens), 0
    believed, owner = np.empty(size, np.float32), np.empty(size, np.int64)
    for s in range(len(stops)):
        for i in range(start, stops[s]):
            believed[i], owner[i] = min(chances[i] * beliefs[s], 1.0), s
        start = stops[s]
    order = np.argsort(-believed, kind="mergesort")
    kept = order[: best_size(believed[order], num_sequences, num_tokens, seconds, sizes)]
    # A child is never likelier than its parent, and comes after it: what is kept holds its own ancestors.
    kept = np.sort(kept)
    place, above, ends = np.full(size, -1, np.int32), np.empty(len(kept), np.int32), np.zeros(len(stops), np.int64)
    for at in range(len(kept)):
        node, s = kept[at], owner[kept[at]]
        first = stops[s - 1] if s else 0
        before = ends[s - 1] if s else 0
        place[node] = at - before
        above[at] = place[first + parents[node]] if parents[node] >= 0 else -1
        for later in range(s, len(stops)):
            ends[later] = at + 1
    return tokens[kept], above, chances[kept], ends


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
def agree_all(tokens, parents, sources, stops, drawn, rows, paths, ends):
    """How far each source goes along with what its sequence said (`agreement`): int64 `[R, 2]`: tokens, and whether it
    had others in place of the next. Sources are as in `fuse_all`, what was said as in `verify_all`."""
    out = np.empty((len(sources), 2), np.int64)
    start, source, first = 0, 0, 0
    for s in range(len(stops)):
        said = np.empty(1 + ends[s] - first, np.int64)
        said[0] = drawn[rows[s]]
        for i in range(first, ends[s]):
            said[1 + i - first] = drawn[rows[s] + 1 + paths[i]]
        while source < stops[s]:
            stop = sources[source]
            right, others = agreement(tokens[start:stop], parents[start:stop], said)
            out[source, 0], out[source, 1] = right, others
            start, source = stop, source + 1
        first = ends[s]
    return out
