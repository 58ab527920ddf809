"""Cuts a batch into micro-batches: about equally long, within a token budget, as many for each rank."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class _Unit:
    """Neighbouring rollouts of one prompt that stay together, and their tokens: the shared prompt counts once."""

    rollouts: np.ndarray
    tokens: int


def cut_microbatches(
    prompt_lengths: np.ndarray, response_lengths: np.ndarray, groups: np.ndarray, num_ranks: int, token_budget: int
) -> list[list[np.ndarray]]:
    """Which rollouts stand in each micro-batch of each rank: `[rank][micro-batch]` int64 `[n]`, rising.

    `prompt_lengths`, `response_lengths` and `groups` (equal for neighbours with one prompt) are `[R]`. Rollouts of
    one prompt stay together as far as the budget and the balance allow, since a pass computes their prompt once.
    Every rank gets as many micro-batches as every other, because ranks meet in collective operations; where there
    are too few rollouts some are empty. No micro-batch exceeds `token_budget` unless a single rollout does.
    Units go, longest first, to the emptiest micro-batch. Depends on the arguments only.
    """
    if len(groups) == 0:
        return [[np.zeros(0, np.int64)] for _ in range(num_ranks)]
    lengths = np.asarray(prompt_lengths, np.int64) + np.asarray(response_lengths, np.int64)
    budget = max(token_budget, int(lengths.max()))
    # Half of a rank's fair share bounds a unit, so that few large groups cannot leave a rank idle.
    limit = budget if num_ranks == 1 else min(budget, max(int(lengths.max()), int(lengths.sum()) // (2 * num_ranks)))
    units = [
        unit
        for group in np.split(np.arange(len(groups)), np.flatnonzero(np.diff(groups)) + 1)
        for unit in _split(group, int(prompt_lengths[group[0]]), response_lengths, limit)
    ]
    per_rank = max(1, -(-sum(u.tokens for u in units) // (num_ranks * budget)))
    while True:
        bins, largest = _longest_first(units, num_ranks * per_rank)
        if largest <= budget:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        per_rank += 1


def _split(rollouts: np.ndarray, prompt_length: int, response_lengths: np.ndarray, limit: int) -> list[_Unit]:
    """A group as units of at most `limit` tokens, by halves."""
    tokens = prompt_length + int(response_lengths[rollouts].sum())
    if tokens <= limit or len(rollouts) == 1:
        return [_Unit(rollouts, tokens)]
    return [u for half in np.array_split(rollouts, 2) for u in _split(half, prompt_length, response_lengths, limit)]


def _longest_first(units: list[_Unit], num_bins: int) -> tuple[list[np.ndarray], int]:
    """Greedy balanced partition: the rollouts of each bin, and the tokens of the fullest."""
    bins: list[list[np.ndarray]] = [[] for _ in range(num_bins)]
    emptiest = [(0, i) for i in range(num_bins)]
    for unit in sorted(units, key=lambda u: (-u.tokens, u.rollouts[0])):
        total, i = heapq.heappop(emptiest)
        bins[i].append(unit.rollouts)
        heapq.heappush(emptiest, (total + unit.tokens, i))
    joined = [np.sort(np.concatenate(b)) if b else np.zeros(0, np.int64) for b in bins]
    return joined, max(total for total, _ in emptiest)
