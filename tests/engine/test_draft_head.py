"""A draft head guesses from what the target has seen, however it came to see it; and the text stays what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from thornback.contracts import EngineConfig, KVImport, ModelError, Request, SamplingParams, SpeculationConfig
from thornback.engine import TorchEngine, generate
from thornback.engine.draft_head import DraftHead, load_draft_head
from thornback.engine.model import load_model
from thornback.engine.packed_attention import PackedBatch

VOCABULARY = 64


@pytest.fixture
def head_for(tmp_path):
    """Writes an untrained head for a model; says whose directory it is in."""

    def make(model, seed: int = 0) -> str:
        DraftHead.new(load_model(model), seed=seed).save(tmp_path / f"head-{seed}")
        return str(tmp_path / f"head-{seed}")

    return make


def engine_of(model, draft: str = "", **config) -> TorchEngine:
    speculation = SpeculationConfig(num_nodes=12, adaptive=False, draft=draft, draft_depth=3, draft_top_k=4)
    return TorchEngine(model, EngineConfig(num_threads=1, speculation=speculation if draft else None, **config))


def requests_of(count: int, **sampling) -> list[Request]:
    rng = np.random.default_rng(count)
    return [
        Request(
            str(i),
            tuple(int(t) for t in rng.integers(5, VOCABULARY, 3 + 9 * (i % 5))),
            SamplingParams(**{"max_tokens": 20, "seed": 100 + i, "ignore_eos": True, **sampling}),
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "n": 3, "top_k": 9}])
def test_lossless(tiny_model, head_for, architecture, dtype, sampling) -> None:
    model, requests = tiny_model(architecture), requests_of(5, **sampling)
    plain = generate(engine_of(model, dtype=dtype), requests)
    engine = engine_of(model, head_for(model), dtype=dtype, block_size=8)
    fast = generate(engine, requests)
    for key, samples in plain.items():
        for wanted, got in zip(samples, fast[key], strict=True):
            assert got.token_ids.tolist() == wanted.token_ids.tolist()
            np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)
    assert engine.speculation.num_drafts > 0
    assert engine.load().num_free_blocks == engine.load().num_blocks


@pytest.mark.parametrize("seconds", [1e-6, 1e6])
def test_a_head_that_cannot_be_worth_its_time_is_not_tried(tiny_model, head_for, monkeypatch, seconds) -> None:
    model, requests = tiny_model("qwen3"), requests_of(2, max_tokens=60, temperature=0.0)
    speculation = SpeculationConfig(num_nodes=12, draft=head_for(model), draft_depth=3, draft_top_k=4)
    engine = TorchEngine(model, EngineConfig(num_threads=1, speculation=speculation))
    assert engine.drafter.seconds(1) > 0, "it is known from the start"
    assert engine.drafter.seconds(32) > engine.drafter.seconds(8)
    asked, propose = [], engine.drafter.propose
    monkeypatch.setattr(engine.drafter, "seconds", lambda num_sequences: seconds)
    monkeypatch.setattr(engine.drafter, "propose", lambda *args: asked.append(1) or propose(*args))
    got = generate(engine, requests)
    assert bool(asked) == (seconds < 1)
    plain = generate(engine_of(model), requests)
    for key, (wanted,) in plain.items():
        assert got[key][0].token_ids.tolist() == wanted.token_ids.tolist()


def guesses(engine: TorchEngine, seq) -> np.ndarray:
    """What the engine's head says of the next token."""
    (drafted,) = engine.drafter.propose([seq])
    return drafted.chances(np.arange(len(drafted.scores)))


def expected(model, directory: str, token_ids: list[int], known: int) -> np.ndarray:
    """The same in one pass over a whole sequence, of which the target has seen the first `known` tokens."""
    target = load_model(model, dtype="float32")
    head = load_draft_head(directory, target, 0)
    batch = PackedBatch.of([np.arange(len(token_ids))], torch.device("cpu"))
    ids = torch.tensor(token_ids)
    positions = torch.arange(len(token_ids))
    with torch.inference_mode():
        states = target.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, batch=batch)
        hidden = torch.cat([torch.zeros(1, states[0].shape[-1]), states[0][0, : len(token_ids) - 1]])
        assert known == len(token_ids) - 1
        return head.lm_head(head(ids, hidden, positions, batch)[-1]).softmax(-1).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_it_reads(tiny_model, head_for, dtype) -> None:
    """After a prompt in chunks and some accepted drafts the head has read what one pass over all would have."""
    model = tiny_model("qwen3")
    draft = head_for(model)
    engine = engine_of(model, draft, dtype=dtype, max_num_batched_tokens=7, block_size=4)
    (request,) = requests_of(1, temperature=1.0)
    engine.add_request(Request("a", (*request.prompt_token_ids, *range(6, 24)), request.sampling))
    while not engine.scheduler.running or engine.scheduler.running[0].num_output_tokens < 9:
        engine.step()
        (seq,) = engine.scheduler.running
        if seq.num_output_tokens:
            wanted = expected(model, draft, seq.token_ids, seq.num_computed_tokens)
            np.testing.assert_allclose(guesses(engine, seq), wanted, atol=1e-5)


def test_a_request_that_moves_takes_what_the_head_has_read(tiny_model, head_for) -> None:
    model = tiny_model("qwen3")
    draft = head_for(model)
    here, there = engine_of(model, draft, block_size=4), engine_of(model, draft, block_size=4)
    plain = engine_of(model, block_size=4)
    (request,) = requests_of(1, temperature=1.0)
    prompt = (*request.prompt_token_ids, *range(6, 24))
    here.add_request(Request("a", prompt, request.sampling, export_kv=True))
    (output,) = here.step()
    export = output.kv
    assert export.num_drafted_tokens == export.num_tokens
    blocks = here.pool.tensor[[b for run in export.runs for b in range(run.start, run.start + run.length)]].numpy()
    moved = Request("b", prompt, request.sampling, output_token_ids=tuple(output.token_ids))
    imported = KVImport(export.num_tokens, blocks, 0, export.num_drafted_tokens, export.hidden)
    there.add_request(moved, imported)
    outputs = there.step()
    (seq,) = there.scheduler.running
    np.testing.assert_allclose(
        guesses(there, seq), expected(model, draft, seq.token_ids, seq.num_computed_tokens), atol=1e-5
    )
    tokens = [*output.token_ids, *(t for o in outputs for t in o.token_ids)]
    while there.has_unfinished_requests():
        tokens += [t for o in there.step() for t in o.token_ids]
    (sample,) = generate(plain, [Request("a", prompt, request.sampling)])["a"]
    assert tokens == sample.token_ids.tolist()


def test_prompts_that_begin_alike_are_read_once(tiny_model, head_for) -> None:
    model = tiny_model("qwen3")
    engine = engine_of(model, head_for(model), block_size=4)
    prompt, sampling = tuple(range(5, 30)), SamplingParams(max_tokens=8, seed=1, ignore_eos=True)
    generate(engine, [Request("a", prompt, sampling)])
    engine.add_request(Request("b", prompt, sampling))
    engine.step()
    (seq,) = engine.scheduler.running
    assert seq.num_cached_tokens == seq.num_drafted_tokens == 24


def test_heads_that_do_not_fit_are_refused(tiny_model, head_for, tmp_path) -> None:
    model = tiny_model("qwen3")
    other = DraftHead.new(load_model(tiny_model("qwen3", hidden_size=128, num_attention_heads=8)))
    other.save(tmp_path / "other")
    with pytest.raises(ModelError, match="hidden_size is 128"):
        engine_of(model, str(tmp_path / "other"))
    draft = head_for(model)
    weights = tmp_path / "head-0" / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:100]):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match="is damaged"):
            engine_of(model, draft)
    weights.unlink()
    with pytest.raises(ModelError, match="is damaged"):
        engine_of(model, draft)
    (tmp_path / "head-0" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no readable config"):
        engine_of(model, draft)
    with pytest.raises(ModelError, match="no readable config"):
        engine_of(model, str(tmp_path / "nowhere"))
    (tmp_path / "head-0" / "config.json").write_text('{"architectures": ["Another"]}')
    with pytest.raises(ModelError, match="neither a draft head nor a model"):
        engine_of(model, draft)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["architectures"] == ["ThornbackDraftHead"]


@pytest.mark.parametrize("fails_at", [0, 3])
def test_a_draft_that_fails_ends_the_guessing_only(tiny_model, head_for, fails_at) -> None:
    model, requests = tiny_model("qwen3"), requests_of(3)
    plain = generate(engine_of(model), requests)
    engine = engine_of(model, head_for(model))
    propose, calls = engine.drafter.propose, []

    def failing(sequences, least_promise):
        calls.append(len(sequences))
        if len(calls) > fails_at:
            raise RuntimeError("the draft is gone")
        return propose(sequences, least_promise)

    engine.drafter.propose = failing
    fast = generate(engine, requests)
    for key, (sample,) in plain.items():
        assert fast[key][0].token_ids.tolist() == sample.token_ids.tolist()
    assert engine.speculation.stats.num_failures == 3
    assert len(calls) == fails_at + 1


def test_a_head_of_nan_says_nothing(tiny_model, head_for) -> None:
    model, requests = tiny_model("qwen3"), requests_of(2)
    plain = generate(engine_of(model), requests)
    draft = head_for(model)
    engine = engine_of(model, draft)
    engine.drafter.head.norm.weight.data[:] = np.nan
    engine.drafter.refresh()
    fast = generate(engine, requests)
    for key, (sample,) in plain.items():
        assert fast[key][0].token_ids.tolist() == sample.token_ids.tolist()
    assert engine.speculation.stats.num_accepted_tokens == 0
