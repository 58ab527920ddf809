"""Where the tokens of a pass lie in the pool, where they stand, and what they see: loops over a few small arrays."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np

from thornback.algorithms.compiled import compiled
from thornback.algorithms.trees import ancestor_bits, depths

NO_TREE = 1 << 40  # a base behind every key
NO_PARENTS = np.empty(0, np.int32)  # of the nodes of none


@compiled
def lay_out(counts, before, parents, stops):
    """Owners, rows, positions, bases and bits, int64 `[5, T]`, of the tokens of sequences that bring `counts` `[B]`
    each, after `before` `[B]` earlier ones, as `PagedBatch.of_nodes` takes them. A sequence's last tokens are a tree,
    where it has one: under the token before them, with the `parents` up to `stops` `[B]`; trees lie one behind the
    other."""
    size = counts.sum()
    out = np.empty((5, size), np.int64)
    owners, rows, positions, bases, bits = out[0], out[1], out[2], out[3], out[4]
    first, at = 0, 0
    for s in range(len(counts)):
        nodes = stops[s] - first
        depth, seen = depths(parents[first : stops[s]]), ancestor_bits(parents[first : stops[s]])
        base = before[s] + counts[s] - nodes - 1
        for i in range(counts[s]):
            row = before[s] + i
            owners[at], rows[at] = s, row
            if nodes:
                node = row - base - 1  # -1: the token under the tree
                positions[at] = base + (depth[node] if node >= 0 else 0)
                bases[at], bits[at] = base, seen[node + 1]
            else:
                positions[at], bases[at], bits[at] = row, NO_TREE, 0
            at += 1
        first = stops[s]
    return out


@compiled
def weave(tokens, counts, wanted, nodes, stops):
    """A pass's tokens int64 `[T]`: of each sequence `counts` `[B]` of the `tokens`, then those of its tree's `nodes`,
    which end at `stops` `[B]`. Also which of them need logits, int64 `[R]`: the last `wanted` `[B]` of a sequence's
    tokens and all its nodes; where each sequence's begin among these `[B]`; and its number of tokens, nodes included
    `[B]`."""
    size = len(tokens) + len(nodes)
    out, rows, first = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(len(counts), np.int64)
    start, node, at, row = 0, 0, 0, 0
    totals = counts.copy()
    for s in range(len(counts)):
        first[s], totals[s] = row, counts[s] + stops[s] - node
        for i in range(counts[s]):
            out[at] = tokens[start + i]
            if counts[s] - i <= wanted[s]:
                rows[row] = at
                row += 1
            at += 1
        start += counts[s]
        while node < stops[s]:
            out[at], rows[row] = nodes[node], at
            at, row, node = at + 1, row + 1, node + 1
    return out, rows[:row], first, totals


@compiled
def place(owners, rows, table, strides, size, heads):
    """Where the keys of layer 0 of each token go, head by head, in a pool whose blocks are `strides` rows apart: int64
    `[T * heads]`; how many tokens each row of `table` has; and the lengths `[T]` of what they see."""
    slots, counts = np.empty(len(owners) * heads, np.int64), np.zeros(len(table), np.int64)
    for t in range(len(owners)):
        first = table[owners[t], rows[t] // size] * strides + rows[t] % size
        for head in range(heads):
            slots[t * heads + head] = first + head * size
        counts[owners[t]] += 1
    return slots, counts, rows + 1


@compiled
def stand(counts, before, parents, stops, table, strides, size, heads):
    """What `lay_out` and `place` say, of sequences of which each brings few tokens, in as few arrays as may be: int64
    `[6, T]`: the tokens' own numbers, owners, lengths, bases, bits and positions; and the slots."""
    owners, rows, positions, bases, bits = lay_out(counts, before, parents, stops)
    slots, _, lengths = place(owners, rows, table, strides, size, heads)
    out = np.empty((6, len(owners)), np.int64)
    for t in range(len(owners)):
        out[0, t], out[1, t], out[2, t] = t, owners[t], lengths[t]
        out[3, t], out[4, t], out[5, t] = bases[t], bits[t], positions[t]
    return out, slots


@compiled
def lay_level(lengths, table, num_before, number, strides, size, heads, rows, positions, slots, seen, bases):
    """The same of level `number`, counted from 1, of trees that a draft grows behind sequences of `lengths` `[B]`
    tokens: their nodes stand behind the `num_before` of earlier levels, as many of each tree. Fills `rows`,
    `positions`, `seen` and `bases` `[T]`, and `slots` `[T * heads]`."""
    width = len(rows) // len(lengths)
    for t in range(len(rows)):
        tree = t // width
        row = lengths[tree] + num_before + t % width
        rows[t], positions[t], seen[t], bases[t] = row, lengths[tree] + number - 1, row + 1, lengths[tree] - 1
        first = table[tree, row // size] * strides + row % size
        for head in range(heads):
            slots[t * heads + head] = first + head * size


@compiled
def draws(first, parents, counts):
    """Of sequences that draw from row `first` `[S]` of the logits, and from the rows after it for the nodes of their
    trees, `counts` `[S]` of them: int64 `[3, R]`, each draw's row, its sequence, and how many places ahead of its next
    one it is."""
    out = np.zeros((3, len(first) + len(parents)), np.int64)
    start, at = 0, 0
    for s in range(len(first)):
        out[0, at], out[1, at] = first[s], s
        depth = depths(parents[start : start + counts[s]])
        for i in range(len(depth)):
            at += 1
            out[0, at], out[1, at], out[2, at] = first[s] + 1 + i, s, depth[i]
        start, at = start + counts[s], at + 1
    return out
