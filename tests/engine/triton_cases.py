"""What `test_triton_attention.py` runs in a process of its own, under Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.passes import Case, drawn_pass, tree
from tests.engine.test_speculation import compare, requests_of
from thornback.contracts import EngineConfig, Request, SamplingParams, SpeculationConfig
from thornback.engine import TorchEngine, decoder_program, device_tokens, generate, kernels, triton_attention
from thornback.engine.attention import PagedBatch
from thornback.engine.draft_head import DraftHead
from thornback.engine.model import load_model

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_triton_attention.py"


@pytest.fixture(autouse=True)
def no_compiled_kernels(monkeypatch):
    """On CPU in float32 they are what works, under the interpreter, too."""
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    monkeypatch.setattr(decoder_program, "_MAX_PACKED", 0)


def check(case: Case, rng: np.random.Generator) -> None:
    query, pool, batch, wanted = drawn_pass(case, rng)
    assert batch.on_device is not None
    assert not batch.groups
    out = torch.full(wanted.shape, 7.0, dtype=case.dtype)
    triton_attention.paged_attention(query, pool, 1, batch.on_device, case.window, 0.3, out, case.shares)
    error = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[case.dtype]
    torch.testing.assert_close(out.double(), wanted, atol=error, rtol=error)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 3, "kv_heads": 1, "width": 24, "window": 7},
        {"heads": 3, "kv_heads": 1, "width": 80, "size": 32, "shares": 2},
        {"heads": 2, "kv_heads": 1, "width": 8, "size": 1, "shares": 4, "window": 70},
    ],
)
def test_ragged_sequences_with_and_without_trees(shape) -> None:
    rng = np.random.default_rng(len(shape))
    trees = {1: tree(rng, 63), 3: tree(rng, 5)}
    check(Case([37, 90, 0, 15, 130, 0], [1, 64, 1, 6, 1, 20], trees, **shape), rng)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shares", [1, 2])
def test_half_precision(dtype, shares) -> None:
    rng = np.random.default_rng(shares)
    check(Case([90, 7], [30, 1], {0: tree(rng, 20)}, width=40, dtype=dtype, shares=shares), rng)


@pytest.mark.parametrize("shares", [2, 8])
def test_shares_of_a_long_context(shares) -> None:
    """Some shares hold nothing that a token sees: those behind a short sequence, or of a tree's other branches."""
    rng = np.random.default_rng(shares)
    for window in (None, 64):
        case = Case([500, 3, 311], [30, 1, 2], {0: tree(rng, 29)}, heads=2, kv_heads=1, shares=shares, window=window)
        check(case, rng)


def test_one_head_of_keys_for_more_heads_than_a_tile_has_rows() -> None:
    check(Case([20], [3], {}, heads=71, kv_heads=1, width=64), np.random.default_rng(0))


def cases(most_tokens: int):
    @st.composite
    def draw_case(draw) -> tuple[Case, int]:
        seed = draw(st.integers(0, 1 << 20))
        rng, trees, lengths = np.random.default_rng(seed), {}, []
        contexts = draw(st.lists(st.integers(0, 3 * most_tokens), min_size=1, max_size=4))
        for sequence in range(len(contexts)):
            nodes = draw(st.integers(0, min(63, most_tokens)))
            if nodes:
                trees[sequence] = tree(rng, nodes)
            lengths.append(nodes + draw(st.integers(1, 3)))
        kv_heads = draw(st.sampled_from([1, 2]))
        case = Case(
            contexts,
            lengths,
            trees,
            kv_heads * draw(st.integers(1, 5)),
            kv_heads,
            draw(st.sampled_from([8, 16, 24, 40])),
            draw(st.sampled_from([1, 4, 6, 16])),
            draw(st.sampled_from([None, None, 1, 5, 50])),
            draw(st.sampled_from([torch.float32, torch.bfloat16])),
            draw(st.sampled_from([0, 1, 2, 4])),
        )
        return case, seed

    return draw_case()


@settings(max_examples=8)
@given(cases(12))
def test_any_small_pass(drawn) -> None:
    check(drawn[0], np.random.default_rng(drawn[1]))


@pytest.mark.full
@settings(max_examples=150)
@given(cases(70))
def test_any_pass(drawn) -> None:
    check(drawn[0], np.random.default_rng(drawn[1]))


# Whole engines


@pytest.fixture(autouse=True)
def memory_of_its_own(monkeypatch):
    """A device's copies are copies: on CPU they would be the host's arrays themselves."""
    made = PagedBatch.of_nodes

    def apart(*args) -> PagedBatch:
        batch = made(*args)
        batch.positions, batch.slots = batch.positions.clone(), batch.slots.clone()
        if batch.on_device is not None:
            batch.on_device.tables = batch.on_device.tables.clone()
        return batch

    monkeypatch.setattr(PagedBatch, "of_nodes", apart)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many tokens each call of the kernel was for."""
    made: list[int] = []
    attend = triton_attention.paged_attention

    def counting(query, pool, layer, at, *rest):
        made.append(at.numbers.shape[1])
        attend(query, pool, layer, at, *rest)

    monkeypatch.setattr(triton_attention, "paged_attention", counting)
    return made


def without_triton(monkeypatch, model, config: EngineConfig, requests: list[Request]):
    with monkeypatch.context() as patch:
        patch.setattr(device_tokens, "usable", lambda pool: False)
        return generate(TorchEngine(model, config), requests)


def test_an_engine_says_the_same(tiny_model, calls, monkeypatch) -> None:
    """Chunks of prompts, single tokens, passes that go on from the last one into new blocks."""
    advanced: list[bool] = []
    advance = PagedBatch.advance

    def counting(*args) -> bool:
        advanced.append(advance(*args))
        return advanced[-1]

    monkeypatch.setattr(PagedBatch, "advance", counting)
    config = EngineConfig(num_threads=1, block_size=4, max_num_seqs=3, max_num_batched_tokens=24)
    requests = requests_of(4, max_tokens=8)
    wanted = without_triton(monkeypatch, tiny_model("qwen3"), config, requests)
    assert not calls
    got = generate(TorchEngine(tiny_model("qwen3"), config), requests)
    assert len(calls) > 16
    assert max(calls) > 10
    assert advanced.count(True) > 5
    for key, (sample,) in wanted.items():
        assert got[key][0].token_ids.tolist() == sample.token_ids.tolist()
        np.testing.assert_allclose(got[key][0].logprobs, sample.logprobs, atol=1e-5)


def test_an_engine_that_speculates_says_the_same(tiny_model, calls) -> None:
    compare(tiny_model("llama"), requests_of(2, max_tokens=9), {"block_size": 8}, least=1.0)
    assert max(calls) > 4


def test_a_draft_head_grows_its_trees(tiny_model, calls, tmp_path, monkeypatch) -> None:
    model, requests = tiny_model("qwen3"), requests_of(2, max_tokens=6)
    DraftHead.new(load_model(model), seed=0).save(tmp_path)
    speculation = SpeculationConfig(num_nodes=8, adaptive=False, draft=str(tmp_path), draft_depth=3, draft_top_k=3)
    config = EngineConfig(num_threads=1, block_size=8, speculation=speculation)
    wanted = without_triton(monkeypatch, model, config, requests)
    engine = TorchEngine(model, config)
    got = generate(engine, requests)
    assert engine.speculation.num_drafts > 0
    assert 2 * 3 in calls, "no level of the trees went through the kernel"
    for key, (sample,) in wanted.items():
        assert got[key][0].token_ids.tolist() == sample.token_ids.tolist()


def test_an_engine_in_half_precision(tiny_model, calls, monkeypatch) -> None:
    config = EngineConfig(num_threads=1, dtype="bfloat16")
    request = Request("a", tuple(range(5, 45)), SamplingParams(max_tokens=1, prompt_logprobs=0))

    def scores() -> list[float]:
        engine = TorchEngine(tiny_model("qwen3"), config)
        engine.add_request(request)
        (output,) = engine.step()
        return [logprob for logprob, _ in output.prompt_logprobs[1:]]

    with monkeypatch.context() as patch:
        patch.setattr(device_tokens, "usable", lambda pool: False)
        wanted = scores()
    assert not calls
    np.testing.assert_allclose(scores(), wanted, atol=0.05)
    assert calls
