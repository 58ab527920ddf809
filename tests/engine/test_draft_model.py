"""A small model guesses what its own plain pass says, however its target came by the tokens; the text stays."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load, save_file

from tests.engine.reference import Reference
from tests.engine.test_draft_head import guesses, requests_of
from thornback.contracts import EngineConfig, KVImport, ModelError, Request, SamplingParams, SpeculationConfig
from thornback.engine import TorchEngine, copy_parameters, drafter, generate, load_model
from thornback.engine.draft_head import DraftHead

DEPTH, WIDTH = 3, 4
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64, "seed": 5}
PROMPT = tuple(range(5, 31))
SAMPLING = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)


@pytest.fixture
def models(tiny_model):
    """A target, and a small model of another architecture."""
    return tiny_model("qwen3"), tiny_model("llama", **SMALL)


def engine_of(model, draft="", **config) -> TorchEngine:
    """Blocks of 4 tokens."""
    speculation = SpeculationConfig(
        num_nodes=12, adaptive=False, draft=str(draft), draft_depth=DEPTH, draft_top_k=WIDTH
    )
    config = {"num_threads": 1, "block_size": 4, **config}
    return TorchEngine(model, EngineConfig(speculation=speculation if draft else None, **config))


def expected(reference: Reference, token_ids: list[int]) -> np.ndarray:
    """What transformers' own code says of the next token."""
    return reference.logits(token_ids)[-1].softmax(-1).numpy()


def tokens_of(samples: dict) -> dict:
    return {key: [s.token_ids.tolist() for s in drawn] for key, drawn in samples.items()}


@pytest.mark.parametrize("pair", [("qwen3", "llama"), ("qwen2", "qwen3"), ("llama", "qwen2")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8, "n": 3, "top_k": 9}])
def test_lossless(tiny_model, pair, dtype, sampling) -> None:
    model, small, requests = tiny_model(pair[0]), tiny_model(pair[1], **SMALL), requests_of(5, **sampling)
    plain = generate(engine_of(model, dtype=dtype), requests)
    engine = engine_of(model, small, dtype=dtype)
    assert (engine.drafter.model.program is not None) == (dtype == "float32")
    fast = generate(engine, requests)
    assert tokens_of(fast) == tokens_of(plain)
    for key, samples in plain.items():
        for wanted, got in zip(samples, fast[key], strict=True):
            np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)
    assert engine.speculation.num_drafts > 0
    assert engine.speculation.num_failures == 0
    assert engine.load().num_free_blocks == engine.load().num_blocks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_its_tree_is_what_its_plain_pass_says(models, dtype) -> None:
    """After a prompt in chunks, and after drafts right and wrong; a node weighs the probability of its path."""
    model, small = models
    engine, reference = engine_of(model, small, dtype=dtype, max_num_batched_tokens=7), Reference(small)
    engine.add_request(Request("a", PROMPT, SAMPLING))
    seen = 0
    while engine.has_unfinished_requests():
        engine.step()
        (seq,) = engine.scheduler.running or (None,)
        if seq is None or not seq.num_output_tokens or len(seq.token_ids) + DEPTH > len(PROMPT) + 18:
            continue
        np.testing.assert_allclose(guesses(engine, seq), expected(reference, seq.token_ids), atol=1e-5)
        tokens, parents, weights = engine.drafter.propose([seq])[0].tree
        assert len(tokens) == WIDTH + WIDTH * WIDTH * (DEPTH - 1)
        paths: list[list[int]] = []
        for token, parent, weight in zip(tokens.tolist(), parents.tolist(), weights.tolist(), strict=True):
            before = paths[parent] if parent >= 0 else []
            paths.append([*before, token])
            above = weights[parent] if parent >= 0 else 1.0
            if len(paths) % 5 == 0:  # some of them
                chance = expected(reference, [*seq.token_ids, *before])[token]
                assert weight == pytest.approx(above * chance, abs=1e-5)
        seen += 1
    assert seen > 5


def test_a_model_that_drafts_for_itself_is_always_right(models) -> None:
    model, _ = models
    speculation = SpeculationConfig(adaptive=False, draft=str(model), draft_depth=DEPTH, draft_top_k=1)
    engine = TorchEngine(model, EngineConfig(num_threads=1, dtype="float64", speculation=speculation))
    sampling = SamplingParams(max_tokens=21, temperature=0.0, ignore_eos=True)
    (sample,) = generate(engine, [Request("a", PROMPT, sampling)])["a"]
    assert len(sample.token_ids) == 21
    stats = engine.speculation.stats
    assert stats.num_drafts == 5  # after the prompt's own token, four a pass
    assert stats.num_accepted_tokens == DEPTH * 5


def test_prompts_that_begin_alike_are_read_once(models) -> None:
    model, small = models
    engine = engine_of(model, small)
    generate(engine, [Request("a", PROMPT, SAMPLING)])
    engine.add_request(Request("b", (*PROMPT[:-1], 40), SAMPLING))
    engine.step()
    (seq,) = engine.scheduler.running
    assert seq.num_cached_tokens == seq.num_drafted_tokens == 24
    np.testing.assert_allclose(guesses(engine, seq), expected(Reference(small), seq.token_ids), atol=1e-5)


def test_samples_of_one_prompt_share_what_was_read(models) -> None:
    model, small = models
    engine, reference = engine_of(model, small), Reference(small)
    engine.add_request(Request("a", PROMPT, SamplingParams(max_tokens=20, seed=3, n=3, ignore_eos=True)))
    engine.step()
    assert [s.num_drafted_tokens for s in engine.scheduler.running] == [len(PROMPT)] * 3
    for _ in range(3):  # their last blocks are copies, and go apart
        for seq in engine.scheduler.running:
            np.testing.assert_allclose(guesses(engine, seq), expected(reference, seq.token_ids), atol=1e-5)
        engine.step()


def test_preempted_sequences_start_over(models) -> None:
    model, small = models
    requests = requests_of(6)
    plain = generate(engine_of(model), requests)
    engine = engine_of(model, small, num_blocks=36, max_num_seqs=6)
    assert tokens_of(generate(engine, requests)) == tokens_of(plain)
    assert engine.load().num_preempted > 0
    assert engine.speculation.num_drafts > 0
    assert engine.load().num_free_blocks == 36


def moved(here: TorchEngine, there: TorchEngine, prompt=PROMPT) -> list[int]:
    """Prefill a request in one engine and import it in the other: the tokens drawn so far."""
    here.add_request(Request("a", prompt, SAMPLING, export_kv=True))
    (output,) = here.step()
    export = output.kv
    blocks = here.pool.tensor[[b for run in export.runs for b in range(run.start, run.start + run.length)]].numpy()
    kv = KVImport(export.num_tokens, blocks, 0, export.num_drafted_tokens, export.hidden)
    there.add_request(Request("b", prompt, SAMPLING, output_token_ids=tuple(output.token_ids)), kv)
    here.release(export.lease)
    return output.token_ids


def rest(engine: TorchEngine) -> list[int]:
    tokens = []
    while engine.has_unfinished_requests():
        tokens += [t for o in engine.step() for t in o.token_ids]
    return tokens


@pytest.mark.parametrize(
    "ways", [("model", "model"), ("head", "model"), ("model", "head"), ("", "model"), ("head", "")]
)
def test_a_request_moves_between_engines_with_any_drafts(models, tmp_path, ways) -> None:
    model, small = models
    DraftHead.new(load_model(model)).save(tmp_path / "head")
    draft_of = {"model": small, "head": tmp_path / "head", "": ""}
    here, there = (engine_of(model, draft_of[way]) for way in ways)
    tokens = moved(here, there)
    tokens += [t for o in there.step() for t in o.token_ids]
    if ways[1] == "model":
        (seq,) = there.scheduler.running
        assert seq.num_cached_tokens == len(PROMPT)
        np.testing.assert_allclose(guesses(there, seq), expected(Reference(small), seq.token_ids), atol=1e-5)
    tokens += rest(there)
    (sample,) = generate(engine_of(model), [Request("a", PROMPT, SAMPLING)])["a"]
    assert tokens == sample.token_ids.tolist()
    assert here.load().num_free_blocks == here.load().num_blocks


def test_a_small_model_exports_nothing_and_reads_nothing_for_it(models) -> None:
    model, small = models
    engine = engine_of(model, small)
    engine.add_request(Request("a", PROMPT, SAMPLING, export_kv=True))
    engine.drafter.model.run = None  # it is not asked
    export = engine.step()[0].kv
    assert (export.num_drafted_tokens, export.hidden) == (0, None)
    assert export.block_shape == engine_of(model).pool.block_shape
    assert engine.speculation.num_failures == 0


def test_a_long_import_is_read_in_parts_beside_others(models, monkeypatch) -> None:
    """Sequences that are up to date are guessed for meanwhile."""
    model, small = models
    monkeypatch.setattr(drafter, "_READS", 12)
    here, there = engine_of(model), engine_of(model, small)
    there.add_request(Request("near", PROMPT[:5], SAMPLING))
    there.step()
    tokens = moved(here, there, PROMPT * 3)
    tokens += [t for o in there.step() for t in o.token_ids if o.request_id == "b"]
    near, far = there.scheduler.running
    told = []
    while len(told) < 20 and not (told and told[-1][1]):
        before = far.num_drafted_tokens
        one, other = there.drafter.propose([near, far])
        assert far.num_drafted_tokens - before <= 12
        told.append((one is not None, other is not None))
    assert all(one for one, _ in told)
    assert len(told) == 7  # 80 tokens
    np.testing.assert_allclose(guesses(there, far), expected(Reference(small), far.token_ids), atol=1e-5)
    while there.has_unfinished_requests():
        tokens += [t for o in there.step() for t in o.token_ids if o.request_id == "b"]
    (sample,) = generate(engine_of(model), [Request("a", PROMPT * 3, SAMPLING)])["a"]
    assert tokens == sample.token_ids.tolist()


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_it_keeps_its_weights_when_its_target_changes(tiny_model, models, in_flight) -> None:
    model, small = models
    weights = copy_parameters(load_model(tiny_model("qwen3", seed=9)))
    engines = [engine_of(model, draft, enable_prefix_caching=False) for draft in (small, "")]
    told = []
    for engine in engines:
        engine.add_request(Request("a", PROMPT, SAMPLING))
        tokens = []
        while len(tokens) < 6:
            tokens += [t for o in engine.step() for t in o.token_ids]
        engine.load_weights(weights, 1, in_flight)
        told.append((tokens, [*tokens, *rest(engine)]))
    if in_flight == "recompute":  # the same whenever the weights changed; "keep": it depends on where
        (_, fast), (_, plain) = told
        assert fast[:6] == plain[:6]
    engine = engines[0]
    engine.add_request(Request("b", PROMPT, SAMPLING))
    engine.step()
    (seq,) = engine.scheduler.running
    np.testing.assert_allclose(guesses(engine, seq), expected(Reference(small), seq.token_ids), atol=1e-5)
    tokens = seq.token_ids[len(PROMPT) :] + rest(engine)
    (sample,) = generate(engines[1], [Request("b", PROMPT, SAMPLING)])["b"]
    assert tokens == sample.token_ids.tolist()


def test_both_pools_count_as_the_caches_memory(models) -> None:
    model, small = models
    memory = 1 << 16
    engine = engine_of(model, small, kv_cache_memory_bytes=memory)
    block = engine.pool.tensor[0].nbytes + engine.drafter.model.pool[0].nbytes
    assert engine.load().num_blocks == len(engine.drafter.model.pool) == memory // block
    assert engine_of(model, kv_cache_memory_bytes=memory).load().num_blocks > memory // block


def test_it_does_not_guess_beyond_its_positions(tiny_model) -> None:
    model, small = tiny_model("qwen3"), tiny_model("llama", **SMALL, max_position_embeddings=32)
    requests = [
        Request("short", PROMPT[:9], SAMPLING),
        Request("over", PROMPT, SAMPLING),  # it crosses the limit
        Request("long", PROMPT * 2, SamplingParams(max_tokens=20, seed=3, n=2, ignore_eos=True)),
    ]
    plain = generate(engine_of(model), requests)
    engine = engine_of(model, small)
    for request in requests:
        drafts = engine.speculation.num_drafts
        assert tokens_of(generate(engine, [request]))[request.request_id] == tokens_of(plain)[request.request_id]
        assert (engine.speculation.num_drafts > drafts) == (request.request_id != "long")
    assert engine.speculation.num_failures == 0


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_draft_that_fails_ends_the_guessing_only(models, fails_at) -> None:
    """In its first read, which is that of a fork; while a tree grows; later."""
    model, small = models
    requests = [
        Request(str(i), PROMPT[i:], SamplingParams(max_tokens=12, seed=i, n=2, ignore_eos=True)) for i in range(2)
    ]
    plain = generate(engine_of(model), requests)
    engine, calls = engine_of(model, small), []
    run = engine.drafter.model.run

    def failing(*arguments):
        calls.append(len(calls))
        if len(calls) > fails_at:
            raise RuntimeError("the draft is gone")
        return run(*arguments)

    engine.drafter.model.run = failing
    assert tokens_of(generate(engine, requests)) == tokens_of(plain)
    assert engine.speculation.stats.num_failures == 4  # samples
    assert engine.load().num_free_blocks == engine.load().num_blocks


def test_an_export_survives_a_draft_that_fails(models, tmp_path) -> None:
    model, _ = models
    DraftHead.new(load_model(model)).save(tmp_path / "head")
    here, there = engine_of(model, tmp_path / "head"), engine_of(model)

    def failing(*arguments):
        raise RuntimeError("the draft is gone")

    here.drafter.model.run = failing
    tokens = moved(here, there) + rest(there)
    assert here.speculation.num_failures == 1
    (sample,) = generate(engine_of(model), [Request("a", PROMPT, SAMPLING)])["a"]
    assert tokens == sample.token_ids.tolist()


def test_models_that_do_not_fit_are_refused(tiny_model, models, tmp_path) -> None:
    model, small = models
    other = tiny_model("llama", **SMALL, vocab_size=512)
    with pytest.raises(ModelError, match="vocabulary of 512 tokens, but the model has"):
        engine_of(model, other)
    draft = tmp_path / "small"
    shutil.copytree(small, draft)
    weights = draft / "model.safetensors"
    whole, tensors = weights.read_bytes(), load(weights.read_bytes())
    for damaged in (whole[: len(whole) // 2], b"", whole[:100]):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match="is damaged"):
            engine_of(model, draft)
    name = "model.layers.0.mlp.up_proj.weight"
    for tensor in (None, tensors[name][:-1].contiguous()):
        changed = {**tensors, name: tensor} if tensor is not None else {k: v for k, v in tensors.items() if k != name}
        save_file(changed, weights, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"lacks 1 of its weights.*{name}"):
            engine_of(model, draft)
    weights.unlink()
    with pytest.raises(ModelError, match="is damaged"):
        engine_of(model, draft)
    index = {"weight_map": {name: "model-00001-of-00002.safetensors"}}
    (draft / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is damaged"):
        engine_of(model, draft)
    for text in ("{", "[]"):
        (draft / "config.json").write_text(text)
        with pytest.raises(ModelError, match="give a directory that thornback draft has written, or a small model's"):
            engine_of(model, draft)
    with pytest.raises(ModelError, match="cannot be loaded"):
        engine_of(model, "nobody/no-such-model")


def test_attention_that_slides_within_a_request_is_refused(tiny_model, tmp_path) -> None:
    model, draft = tiny_model("qwen3"), tmp_path / "small"
    shutil.copytree(tiny_model("qwen2", **SMALL), draft)
    config = json.loads((draft / "config.json").read_text())
    config.update(use_sliding_window=True, sliding_window=64, max_window_layers=0)
    config.pop("layer_types", None)
    (draft / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="attends to the last 64 tokens only"):
        engine_of(model, draft)
    engine = engine_of(model, draft, max_model_len=64)
    assert len(generate(engine, [Request("a", PROMPT, SAMPLING)])["a"][0].token_ids) == 20
