"""Sampling with speculation draws from exactly the model's distribution, whatever is proposed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.reference import Reference, allowed
from tests.engine.trees import tree_of
from thornback.contracts import EngineConfig, Request, SamplingParams, SpeculationConfig, TokenTree
from thornback.engine import TorchEngine

PROMPT = (7, 21, 9, 40)
COMBINATIONS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), values, strict=True))
    for values in itertools.product((1.0, 0.6), (0, 8), (1.0, 0.8), (0.0, 0.05))
]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A random model that is less indifferent than they are."""
    directory = tmp_path_factory.mktemp("decided")
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model("qwen3"))
    loaded.model.norm.weight.data.mul_(2.5)  # more, and it repeats itself
    loaded.save_pretrained(directory)
    return directory


class Likely:
    """Proposes trees of the tokens that the model likes, of changing shapes: one after the other of a thousand."""

    def __init__(self, tokens: list[int]) -> None:
        rng = np.random.default_rng(0)
        paths = [[rng.choice(tokens, 2).tolist() for _ in range(5)] for _ in range(997)]
        self.trees = itertools.cycle([tree_of(of_one) for of_one in paths])

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        return next(self.trees)


def third_token(reference: Reference, params: SamplingParams) -> tuple[np.ndarray, list[int]]:
    """The exact distribution of the third token, and the tokens that are likely to come second or third."""

    def following(prefixes: list[tuple[int, ...]]) -> list[np.ndarray]:
        with torch.no_grad():
            logits = reference.model(torch.tensor([PROMPT + prefix for prefix in prefixes])).logits[:, -1].double()
        return [allowed(row, params) for row in logits.numpy()]

    (first,) = following([()])
    ones = [(int(a),) for a in np.flatnonzero(first)]
    seconds = following(ones)
    pairs = [(*a, int(b)) for a, p in zip(ones, seconds, strict=True) for b in np.flatnonzero(p)]
    weights = [first[a] * p[b] for (a,), p in zip(ones, seconds, strict=True) for b in np.flatnonzero(p)]
    exact = np.einsum("i,iv->v", np.asarray(weights), np.stack(following(pairs)))
    likely = np.argsort(-sum(first[a] * p for (a,), p in zip(ones, seconds, strict=True)))[:6]
    return exact, likely.tolist()


def chi_square(counts: np.ndarray, exact: np.ndarray) -> float:
    """The chance of counts this far off; cells of fewer than ten are taken together."""
    expected = exact * counts.sum()
    small = expected < 10
    cells = np.append(expected[~small], expected[small].sum()), np.append(counts[~small], counts[small].sum())
    if cells[0][-1] == 0:
        assert cells[1][-1] == 0, "a token was drawn that may not be"
        cells = cells[0][:-1], cells[1][:-1]
    statistic = float((((cells[1] - cells[0]) ** 2) / cells[0]).sum())
    freedom = torch.tensor((len(cells[0]) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def check(directory: Path, sampling: dict, num_samples: int, num_tests: int) -> None:
    config = EngineConfig(num_threads=1, speculation=SpeculationConfig(num_nodes=10, adaptive=False))
    exact, likely = third_token(Reference(directory), SamplingParams(**sampling))
    engine = TorchEngine(directory, config, (Likely(likely),))
    each = 100
    counts = np.zeros(len(exact))
    for i in range(num_samples // each):
        params = SamplingParams(max_tokens=4, seed=1000 + i * each, n=each, ignore_eos=True, **sampling)
        engine.add_request(Request(str(i), PROMPT, params))
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    for drawn in tokens.values():
        counts[drawn[2]] += 1
    assert counts.sum() == num_samples
    assert engine.speculation.num_accepted_tokens > num_samples / 100
    assert chi_square(counts, exact) > 0.01 / num_tests


def test_the_distribution_of_sampled_tokens(model) -> None:
    check(model, {"temperature": 0.6, "top_p": 0.8}, 5_000, 1)


@pytest.mark.full
@pytest.mark.parametrize("sampling", COMBINATIONS, ids=str)
def test_the_distribution_under_every_combination_of_parameters(model, sampling) -> None:
    check(model, sampling, 100_000, len(COMBINATIONS))


def test_another_distribution_is_noticed(model) -> None:
    """The test above can fail: counts of a slightly warmer distribution are told from the exact ones."""
    reference = Reference(model)
    exact, _ = third_token(reference, SamplingParams(temperature=0.6))
    warmer, _ = third_token(reference, SamplingParams(temperature=0.7))
    counts = np.random.default_rng(0).multinomial(100_000, warmer / warmer.sum())
    assert chi_square(counts, exact) < 1e-6
