"""How much to guess: the size of draft trees by what a pass costs and by how often guesses were right (ours)."""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import numpy as np

from thornback.algorithms.compiled import compiled

# How often a guessed token is right before anything is known of a sequence, and for how many guesses that counts.
_PRIOR, _TRUST = 0.75, 3.0
FORGETTING = 0.9  # what an earlier pass weighs beside the one after it


_MISSES, _LONGEST_REST = 2, 64  # so many trees in a row without a right node are nothing; passes of a rest, at most

# What is remembered of a sequence is a row of float64, `record_size` long: the tokens that were accepted of its trees,
# and the number that the trees' chances came to; how many trees in a row had no right node, and for how many passes the
# sequence is not guessed for; then of each source of guesses, the draft first, the tokens that were right, and those
# that were tried.
_ACCEPTED, _PROMISED, _MISSED, _REST, _SOURCES = 0, 1, 2, 3, 4


def record_size(num_sources: int) -> int:
    return _SOURCES + 2 * num_sources


@compiled
def rate(record, source):
    """How often the next guess of a source will be right, each token of it."""
    at = _SOURCES + 2 * source
    return (record[at] + _PRIOR * _TRUST) / (record[at + 1] + _TRUST)


@compiled
def doubt(record, source):
    """How much oftener than usual a source is wrong."""
    return (1.0 - rate(record, source)) / (1.0 - _PRIOR)


@compiled
def forget(record, source):
    """A pass without a guess: what is known grows old, so that guessing is tried again some time."""
    at = _SOURCES + 2 * source
    record[at] *= FORGETTING
    record[at + 1] *= FORGETTING


@compiled
def learn(record, source, num_accepted, stopped):
    """So many tokens of a source in a row were right; then `stopped`, in [0, 1], guesses were wrong: 0 if its tree
    ended."""
    forget(record, source)
    at = _SOURCES + 2 * source
    record[at] += num_accepted
    record[at + 1] += num_accepted + stopped


@compiled
def belief(record):
    """By which chances are believed: what was accepted of what was promised."""
    return (record[_ACCEPTED] + _TRUST) / (record[_PROMISED] + _TRUST)


@compiled
def learn_belief(record, num_accepted, promised):
    """A tree whose chances came to `promised` had so many nodes accepted."""
    record[_ACCEPTED] = FORGETTING * record[_ACCEPTED] + num_accepted
    record[_PROMISED] = FORGETTING * record[_PROMISED] + promised


@compiled
def learn_rest(record, num_accepted):
    """A sequence whose trees have no right node time after time rests, twice as long after each."""
    record[_MISSED] = 0.0 if num_accepted else record[_MISSED] + 1.0
    record[_REST] = min(2.0 ** (record[_MISSED] - _MISSES), _LONGEST_REST) if record[_MISSED] > _MISSES else 0.0


@compiled
def rests(records, slots):
    """Which of the sequences, whose records are in rows `slots` `[S]` (-1: it has none), rest in this pass, bool `[S]`;
    it counts as one of their rests."""
    found = np.zeros(len(slots), np.bool_)
    for s in range(len(slots)):
        if slots[s] >= 0 and records[slots[s], _REST] > 0.0:
            records[slots[s], _REST] -= 1.0
            found[s] = True
    return found


@compiled
def best_size(likely, num_sequences, num_tokens, seconds, sizes):
    """How many of the nodes, whose chances are `likely` `[N]` from the best down, a pass should verify: as many as give
    the most tokens a second.

    The pass draws for `num_sequences` sequences and carries `num_tokens` tokens anyway; `seconds` `[S]` is what passes
    of `sizes` `[S]` tokens take, ascending; what is between them is interpolated, what is beyond is extended.
    """
    best, best_rate, gained, at = 0, 0.0, float(num_sequences), 0
    for count in range(len(likely) + 1):
        if count:
            gained += likely[count - 1]
        total = num_tokens + count
        while at + 2 < len(sizes) and sizes[at + 1] < total:
            at += 1
        share = max(0.0, (total - sizes[at]) / (sizes[at + 1] - sizes[at]))
        rate = gained / (seconds[at] + share * (seconds[at + 1] - seconds[at]))
        if rate > best_rate:
            best, best_rate = count, rate
    return best
