"""Draws against the definition, row by row, and against exact probabilities."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from tests.engine.reference import allowed
from thornback.contracts import SamplingParams
from thornback.engine.randomness import positional_uniform
from thornback.engine.sampler import SamplingBatch, sample


@settings(max_examples=150, deadline=None)
@given(
    vocabulary=st.sampled_from([2, 5, 63, 64, 65, 200]),
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.2, 2.0),
    top_k=st.integers(-1, 12),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
)
def test_a_draw_is_the_inverse_cdf_in_order_of_token_id(vocabulary, seed, temperature, top_k, top_p, min_p) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, vocabulary)) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    uniform = rng.random(3)
    sampled = sample(torch.from_numpy(logits), SamplingBatch.of([params] * 3), uniform)
    for row in range(3):
        p = allowed(logits[row].astype(np.float32).astype(np.float64), params)
        edges = np.cumsum(p)
        wanted = int(np.searchsorted(edges, uniform[row], side="right"))
        near_edge = np.abs(edges - uniform[row]).min() < 1e-5
        near_cut = np.isclose(p[p > 0].min() if (p > 0).any() else 0, 0, atol=1e-9)
        if sampled.tokens[row] != wanted:
            assert near_edge or near_cut or p[sampled.tokens[row]] > 0
            assert near_edge or _cut_ties(logits[row], params)
        scores = logits[row] / temperature
        exact = scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max()
        assert abs(sampled.logprobs[row] - exact[sampled.tokens[row]]) < 1e-4


def _cut_ties(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether a hair's breadth of top_p or min_p changes which tokens are kept."""
    kept = [
        tuple(allowed(logits, SamplingParams(
            temperature=params.temperature, top_k=params.top_k,
            top_p=float(np.clip(params.top_p + d, 1e-9, 1.0)), min_p=float(np.clip(params.min_p + d, 0, 1)),
        )) > 0)
        for d in (-1e-5, 1e-5)
    ]  # fmt: skip
    return kept[0] != kept[1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.4, top_k=9, top_p=0.8, min_p=0.02),
    ],
)
def test_many_draws_follow_the_distribution(params) -> None:
    count, logits = 100_000, np.random.default_rng(3).normal(size=16) * 1.5
    uniform = positional_uniform(np.arange(count, dtype=np.uint64), np.full(count, 4, np.uint64))
    batch = SamplingBatch.of([params] * count)
    tokens = np.asarray(sample(torch.from_numpy(np.tile(logits, (count, 1))), batch, uniform).tokens)
    p = allowed(logits, params)
    seen = np.bincount(tokens, minlength=16)
    assert (seen[p == 0] == 0).all()
    expected = p[p > 0] * count
    chi_square = ((seen[p > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 3.5 * np.sqrt(2 * degrees) + 6  # far above the 99.8th percentile


def test_rows_of_one_batch_do_not_disturb_each_other() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    rows = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(temperature=2.0),
        SamplingParams(top_p=0.3),
    ]
    uniform = np.array([0.3, 0.9, 0.1, 0.6])
    together = sample(logits, SamplingBatch.of(rows), uniform)
    for i, params in enumerate(rows):
        alone = sample(logits[i : i + 1], SamplingBatch.of([params]), uniform[i : i + 1])
        assert together.tokens[i] == alone.tokens[0]
        assert together.logprobs[i] == pytest.approx(alone.logprobs[0], abs=1e-6)


def test_banned_tokens_are_never_drawn_not_even_far_below_the_peak() -> None:
    logits = torch.tensor([[500.0, 0.0, -1.0, 400.0]])
    banned = torch.tensor([[True, False, False, True]])
    for temperature in (0.0, 1.0):
        batch = SamplingBatch.of([SamplingParams(temperature=temperature)])
        assert sample(logits, batch, np.array([0.5]), banned).tokens == [1]


@pytest.mark.parametrize("edge", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_fall_on_tokens_that_can_be_drawn(edge) -> None:
    logits = torch.full((1, 130), -torch.inf)
    logits[0, 3] = 0.0
    logits[0, 100] = 0.0
    token = sample(logits, SamplingBatch.of([SamplingParams()]), np.array([edge])).tokens[0]
    assert token == (3 if edge == 0.0 else 100)


def test_positional_numbers_are_uniform_and_independent() -> None:
    seeds, positions = np.meshgrid(np.arange(400, dtype=np.uint64), np.arange(400, dtype=np.uint64))
    u = positional_uniform(seeds.ravel(), positions.ravel()).reshape(400, 400)
    assert (u >= 0).all()
    assert (u < 1).all()
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - 1600) ** 2 / 1600).sum() < 160
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):  # neighbours in position, neighbours in seed
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
    assert len(np.unique(u)) == u.size
