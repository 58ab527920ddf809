"""Cutting a batch: everything once, within the budget, as many for each rank, groups together where they fit."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from thornback.actors.microbatches import cut_microbatches


@st.composite
def batches(draw):
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    prompts = np.repeat(draw(st.lists(st.integers(1, 40), min_size=len(sizes), max_size=len(sizes))), sizes)
    responses = np.array(draw(st.lists(st.integers(1, 60), min_size=len(groups), max_size=len(groups))))
    return prompts, responses, groups


def tokens(rollouts, prompts, responses, groups):
    """Tokens of one pass: neighbours with one prompt share it."""
    starts = np.concatenate([[True], np.diff(groups[rollouts]) != 0]) if len(rollouts) else np.zeros(0, bool)
    return int(responses[rollouts].sum() + prompts[rollouts][starts].sum())


@given(batches(), st.integers(1, 4), st.integers(1, 400))
def test_every_rollout_once_within_the_budget_and_as_many_for_each_rank(batch, num_ranks, budget):
    prompts, responses, groups = batch
    cut = cut_microbatches(prompts, responses, groups, num_ranks, budget)
    assert len(cut) == num_ranks
    assert len({len(rank) for rank in cut}) == 1
    together = np.concatenate([rollouts for rank in cut for rollouts in rank])
    assert sorted(together.tolist()) == list(range(len(groups)))
    longest = int((prompts + responses).max())
    for rank in cut:
        for rollouts in rank:
            assert (np.diff(rollouts) > 0).all()
            assert tokens(rollouts, prompts, responses, groups) <= max(budget, longest)


@given(batches())
def test_one_pass_where_all_fits(batch):
    cut = cut_microbatches(*batch, num_ranks=1, token_budget=10**6)
    assert [r.tolist() for r in cut[0]] == [list(range(len(batch[2])))]


def test_ranks_are_balanced_and_groups_stay_whole():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(16), 8)
    prompts, responses = np.full(128, 20), rng.integers(5, 60, 128)
    cut = cut_microbatches(prompts, responses, groups, num_ranks=2, token_budget=10**6)
    loads = [tokens(rank[0], prompts, responses, groups) for rank in cut]
    assert max(loads) - min(loads) < 0.05 * sum(loads)
    assert not set(groups[cut[0][0]]) & set(groups[cut[1][0]])


def test_one_large_group_is_shared_out():
    groups, prompts, responses = np.zeros(64, int), np.full(64, 10), np.full(64, 30)
    cut = cut_microbatches(prompts, responses, groups, num_ranks=4, token_budget=10**6)
    assert all(12 <= len(rank[0]) <= 20 for rank in cut)


def test_no_rollouts_is_an_empty_pass():
    none = np.zeros(0, int)
    assert [[r.tolist() for r in rank] for rank in cut_microbatches(none, none, none, 2, 10)] == [[[]], [[]]]
