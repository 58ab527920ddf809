"""What is said does not depend on guesses: every way of guessing, architecture, batch size; greedy and sampled."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.engine.reference import Reference
from thornback.contracts import EngineConfig, Request, SamplingParams, SpeculationConfig
from thornback.data import Datastore, PromptLookup
from thornback.engine import TorchEngine, generate
from thornback.engine.draft_head import DraftHead
from thornback.engine.model import load_model

VOCABULARY, NEW_TOKENS = 64, 12
WAYS = ("prompt lookup", "retrieval", "draft", "model", "rasd")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}  # what drafts


def requests_of(count: int, temperature: float) -> list[Request]:
    """Prompts of 2 to 25 tokens; many hold the same tokens twice."""
    rng = np.random.default_rng(count)
    requests = []
    for i in range(count):
        said = rng.integers(5, VOCABULARY, rng.integers(1, 9)).tolist()
        prompt = (*rng.integers(5, VOCABULARY, rng.integers(1, 10)).tolist(), *said, *said[: i % len(said) + 1])
        sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=i, ignore_eos=True)
        requests.append(Request(str(i), prompt, sampling))
    return requests


def answers(engine: TorchEngine, requests: list[Request]) -> list[list[int]]:
    drawn = generate(engine, requests)
    return [drawn[request.request_id][0].token_ids.tolist() for request in requests]


@cache
def plain_answers(model: Path, count: int, temperature: float) -> list[list[int]]:
    """Decoded one token a pass, 32 sequences at a time."""
    return answers(TorchEngine(model, EngineConfig(num_threads=1, max_num_seqs=32)), requests_of(count, temperature))


def draft_of(model: Path, small: Path, place: Path, way: str) -> str:
    """The directory of what drafts."""
    if way in ("draft", "rasd"):
        DraftHead.new(load_model(model)).save(place / "head")
        return str(place / "head")
    return str(small) if way == "model" else ""


def compare(model: Path, small: Path, place: Path, way: str, batch: int, temperature: float, count: int) -> None:
    requests, wanted = requests_of(count, temperature), plain_answers(model, count, temperature)
    uses = {"prompt lookup": "p", "retrieval": "r", "rasd": "pr"}.get(way, "")
    documents = [[*r.prompt_token_ids, *a] for r, a in zip(requests, wanted, strict=True)][::2]  # every second is known
    draft = draft_of(model, small, place, way)
    speculation = SpeculationConfig(num_nodes=24, adaptive=False, draft=draft, draft_depth=3, draft_top_k=4)
    retrievers = [PromptLookup()] if "p" in uses else []
    if "r" in uses:
        retrievers.append(Datastore.build(documents, VOCABULARY * 2))
    config = EngineConfig(num_threads=1, max_num_seqs=batch, speculation=speculation)
    engine = TorchEngine(model, config, tuple(retrievers))
    got, reference = answers(engine, requests), Reference(model)
    for request, tokens, expected in zip(requests, got, wanted, strict=True):
        reference.assert_same(request.prompt_token_ids, tokens, expected, request.sampling)
    stats = engine.speculation.stats
    assert stats.num_drafts > 0
    if "r" in uses:  # also beside a draft head that knows nothing
        assert stats.num_accepted_tokens > count


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_of_the_grid(tiny_model, tmp_path, way, temperature) -> None:
    compare(tiny_model("qwen3"), tiny_model("llama", **SMALL), tmp_path, way, 8, temperature, count=40)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_grid(tiny_model, tmp_path, architecture, way, batch, temperature) -> None:
    compare(tiny_model(architecture), tiny_model("llama", **SMALL), tmp_path, way, batch, temperature, count=500)
