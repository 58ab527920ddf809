"""Draft trees: pruning, fusion and verification (RASD, papers.md section 3).

A tree of N proposed tokens hangs under a sequence's last token. It is two arrays, `tokens` and `parents` `[N]`: node i
stands under node `parents[i]`, or directly under the last token where that is -1; parents come before their children,
and no two children of a node carry the same token.
"""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np

from thornback.algorithms.compiled import compiled


@compiled
def likelihoods(tokens, parents, weights, match_length, doubt, first, least):
    """How likely each node of a retrieved tree is right, float32 `[N]` (ours). Its chance behind its parent is its
    share of the continuations there, less a doubt: exp(-(n - 1) / 7) * c ** -0.1 * `doubt`, at most 0.97.

    n: the tokens that are known to agree where the node is reached: the `match_length` (0, unknown, counts as 8), and
    the nodes above. c: how many continuations there are. So a chain that was found behind two tokens is hardly believed
    at its first token, and more with each that comes true. Both numbers were fitted to prompts 20 to 43 of each task of
    the `rasd` benchmark, held-out ones, of which its measurement of speed answers some; on prompts 60 to 79, which none
    answers, no other pair that was tried gives more than 0.3 % more tokens a pass.

    Where a draft's distribution of the next token is known at the branches' first nodes, `first` `[branches]`, in order
    (else empty), branches below `least` get 0, and are pruned thereby."""
    out, agreed = np.empty(len(tokens), np.float32), np.empty(len(tokens), np.int64)
    total, branch = 0.0, 0
    for i in range(len(tokens)):
        if parents[i] < 0:
            total += weights[i]
    for i in range(len(tokens)):
        if parents[i] < 0:
            chance, count, agreed[i] = 1.0, total, match_length if match_length else 8
            if len(first) and first[branch] < least:
                chance = 0.0
            branch += 1
        else:
            chance, count, agreed[i] = out[parents[i]], weights[parents[i]], agreed[parents[i]] + 1
        doubted = min(0.97, np.exp((1 - agreed[i]) / 7) * count**-0.1 * doubt)
        out[i] = chance * weights[i] / count * (1 - doubted)
    return out


@compiled
def fuse(tokens, parents, chances, stops, num_nodes, max_depth):
    """One tree of several sources': each path of a later one is walked down the earlier ones while tokens agree,
    and what is left of it is attached there (longest prefix matching); then only the `num_nodes` likeliest nodes of at
    most `max_depth` are kept. Sources lie one behind the other, up to `stops` `[S]`, parents counted within each.

    Behind a node, a token is right where any source is, if they err independently; what the tokens there come to is 1
    at most (ours). Returns tokens, parents and chances."""
    size = len(tokens)
    found, above, share = np.empty(size, np.int32), np.empty(size, np.int32), np.zeros(size, np.float64)
    depth, place = np.empty(size, np.int64), np.full(size, -1, np.int64)
    child, sibling = np.full(size + 1, -1, np.int64), np.full(size, -1, np.int64)
    number, start = 0, 0
    for stop in stops:
        for i in range(start, stop):
            under = place[start + parents[i]] if parents[i] >= 0 else -1
            if not chances[i] > 0 or (parents[i] >= 0 and under < 0):  # also where a draft says NaN
                continue
            chance = np.float64(chances[i])
            if parents[i] >= 0:
                chance /= chances[start + parents[i]]
            level = 1 if under < 0 else depth[under] + 1
            if level > max_depth:
                continue
            node = child[under + 1]
            while node >= 0 and found[node] != tokens[i]:
                node = sibling[node]
            if node < 0:
                node = number
                number += 1
                found[node], above[node], depth[node] = tokens[i], under, level
                sibling[node], child[under + 1] = child[under + 1], node
            share[node] += (1.0 - share[node]) * min(chance, 1.0)
            place[i] = node
        start = stop
    total, likely = np.zeros(number + 1, np.float64), np.empty(number, np.float32)
    for i in range(number):
        total[above[i] + 1] += share[i]
    for i in range(number):
        chance = share[i] / max(total[above[i] + 1], 1.0)
        likely[i] = chance * likely[above[i]] if above[i] >= 0 else chance
    # A child is never likelier than its parent, and comes after it, so that the best nodes bring their ancestors.
    best = np.sort(np.argsort(-likely, kind="mergesort")[:num_nodes])
    to = np.full(number + 1, -1, np.int32)
    to[best] = np.arange(len(best))
    return found[best], to[above[best]], likely[best]


@compiled
def depths(parents):
    """How many tokens after the sequence's last one each node stands, int64 `[N]`, from 1."""
    found = np.empty(len(parents), np.int64)
    for i in range(len(parents)):
        found[i] = 1 if parents[i] < 0 else found[parents[i]] + 1
    return found


@compiled
def ancestor_bits(parents):
    """int64 `[1 + N]`: what the last token (bit 0) and each node i (bit 1 + i) may see of them: their ancestors and
    themselves. Raises `ValueError` for more than 63 nodes."""
    if len(parents) > 63:
        raise ValueError("A tree has more nodes than the 63 that can be verified at once.")
    bits = np.empty(1 + len(parents), np.int64)
    bits[0] = 1
    for i in range(len(parents)):
        bits[i + 1] = bits[parents[i] + 1] | np.int64(1) << np.int64(i + 1)
    return bits


@compiled
def is_tree(tokens, parents, vocab_size):
    """Whether these are nodes that stand behind their parents, with tokens of the vocabulary."""
    for i in range(len(tokens)):  # noqa: SIM110 (compiled: no generators)
        if not (0 <= tokens[i] < vocab_size and -1 <= parents[i] < i):
            return False
    return True


@compiled
def agreement(tokens, parents, said):
    """How many of the tokens `said` a tree has one below the other, and whether it has others in place of the next."""
    node, right = -1, 0
    for token in said:
        child, others = -1, False
        for i in range(node + 1, len(tokens)):
            if parents[i] == node:
                others = True
                if tokens[i] == token:
                    child = i
                    break
        if child < 0:
            return right, others
        node = child
        right += 1
    return right, False


@compiled
def verify(tokens, parents, drawn):
    """The nodes that the target agrees with, from the root down, int64. `drawn` `[1 + N]`: the token that the target
    draws after the last token, and after each node. The output is the drawn tokens along that path, the one after its
    end included: what plain decoding draws, since every position has one number of its own."""
    path = np.empty(len(tokens), np.int64)
    node, length = -1, 0
    while True:
        child = -1
        for i in range(node + 1, len(tokens)):
            if parents[i] == node and tokens[i] == drawn[node + 1]:
                child = i
                break
        if child < 0:
            return path[:length]
        path[length] = node = child
        length += 1
