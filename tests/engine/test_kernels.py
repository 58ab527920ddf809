"""The compiled kernels compute what the same formula in torch does, and the lean modules what transformers' do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from thornback.contracts import EngineConfig, Request, SamplingParams
from thornback.engine import TorchEngine, compiled, copy_parameters, generate, kernels, load_model
from thornback.engine.attention import NO_TREE, PagedBatch
from thornback.engine.compiled import Program
from thornback.engine.paged_attention import PagedTokens, paged_attention
from thornback.engine.products import ADD, SILU_PRODUCT, STORE, Packed, product, rows_per_task
from thornback.engine.sampler import SamplingBatch, sample
from thornback.engine.vectors import LANES

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (3, 1, 24), (2, 2, 8)])
def test_attention_over_blocks_of_any_order(heads, kv_heads, width, window, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(heads)
    pool = torch.randn(40, 3, 2, kv_heads, 16, width, generator=generator)
    lengths = torch.randint(1, 65, (19,), generator=generator)
    tables = torch.stack([torch.randperm(40, generator=generator)[:4] for _ in range(5)])
    owners, tokens = torch.arange(19) % 5, torch.randperm(23, generator=generator)[:19]
    query = torch.randn(23, heads + 1, width, generator=generator)[:, :heads]  # tokens lie apart
    out = torch.full((23, heads, width), 7.0)
    bases, bits = torch.full((19,), NO_TREE), torch.zeros(19, dtype=torch.int64)
    at = PagedTokens(tokens, owners, lengths, bases, bits, tables)
    paged_attention(query, pool, 1, at, window, 0.3, out)
    torch.set_num_threads(before)
    for token, owner, length in zip(tokens, owners, lengths, strict=True):
        keys, values = pool[tables[owner], 1].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, width)
        seen = slice(max(0, int(length) - window) if window else 0, int(length))
        wanted = functional.scaled_dot_product_attention(
            query[token][:, None], keys[:, seen], values[:, seen], scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[token], wanted[:, 0], atol=1e-5, rtol=1e-5)
    rest = [i for i in range(23) if i not in tokens.tolist()]
    assert (out[rest] == 7).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("num", "inputs", "outputs"), [(1, 24, 32), (8, 5, 200), (70, 48, 7), (300, 64, 96)])
def test_products_over_packed_weights(num, inputs, outputs, threads) -> None:
    """Any number of rows and outputs, several layers in one product, a bias, and what follows a product."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layers = [nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)]
    x = torch.randn(num, inputs + 3)  # rows lie apart

    def run(packed: Packed, then: int, out: torch.Tensor) -> torch.Tensor:
        packed.load()
        product(
            1 << 20, x.data_ptr(), x.shape[1], packed.panels.data_ptr(), out.data_ptr(), out.shape[1], num, inputs,
            packed.outputs, rows_per_task(num, packed.outputs), then,
        )  # fmt: skip
        return out

    first, second = (layer(x[:, :inputs]) for layer in layers)
    torch.testing.assert_close(
        run(Packed(*layers), STORE, torch.empty(num, 2 * outputs)), torch.cat([first, second], 1)
    )
    residual = torch.randn(num, outputs)
    torch.testing.assert_close(run(Packed(layers[0]), ADD, residual.clone()), residual + first)
    if outputs % LANES == 0:
        gated = run(Packed(*layers, interleave=True), SILU_PRODUCT, torch.empty(num, outputs))
        torch.testing.assert_close(gated, functional.silu(first) * second)
    torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_silu_of_any_size(scale) -> None:
    gate, up = nn.Linear(8, 64, bias=False), nn.Linear(8, 64, bias=False)
    x, out = torch.randn(37, 8) * scale * 10, torch.empty(37, 64)
    packed = Packed(gate, up, interleave=True)
    packed.load()
    product(1, x.data_ptr(), 8, packed.panels.data_ptr(), out.data_ptr(), 64, 37, 8, 128, 16, SILU_PRODUCT)
    torch.testing.assert_close(out, functional.silu(gate(x)) * up(x), rtol=1e-5, atol=1e-6)


def test_a_program_waits_for_every_thread_between_its_calls() -> None:
    """Each call reads what the one before it wrote, whichever thread wrote it; over and over."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    here, there, order = torch.zeros(500, 3), torch.zeros(500, 3), torch.arange(499, -1, -1)
    here[:] = torch.arange(500)[:, None]
    calls = []
    for source, target in ((here, there), (there, here)) * 50 + ((here, there),):
        values = {"rows": 500, "index": order.data_ptr(), "num": 500, "width": 3}
        call = kernels.gather.struct(table=source.data_ptr(), out=target.data_ptr(), **values)
        calls.append((kernels.gather, call))
    program = Program(calls)
    for _ in range(20):
        there.zero_()
        program.run(0, len(calls))
        assert (there[:, 0] == order).all()
        assert (here[:, 0] == order.flip(0)).all()
    torch.set_num_threads(before)


def _run_in_a_process(code: str, **variables: str) -> None:
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, timeout=60, check=True)


GATHER = (
    "import torch; torch.set_num_threads(2)\n"
    "from thornback.engine import kernels\n"
    "from thornback.engine.compiled import Program\n"
    "a, b, index = torch.ones(9, 2), torch.zeros(9, 2), torch.arange(9)\n"
    "places = {'table': a.data_ptr(), 'index': index.data_ptr(), 'out': b.data_ptr()}\n"
    "call = kernels.gather.struct(rows=9, num=9, width=2, **places)\n"
    "Program([(kernels.gather, call)] * 3).run(0, 3)\n"
    "assert b.sum() == 18"
)


def test_a_program_runs_on_as_many_threads_as_it_gets() -> None:
    """OpenMP may give fewer threads than were asked for: nobody then waits for those that never came."""
    _run_in_a_process(GATHER, OMP_THREAD_LIMIT="1")


ATTEND = (
    "from thornback.engine import paged_attention\n"
    "for width in (8, 16): paged_attention.attention_kernel(4, 2, width, 16)"
)


def test_kernels_are_kept_where_that_is_possible(tmp_path) -> None:
    code = f"{GATHER}\n{ATTEND}"
    _run_in_a_process(GATHER, XDG_CACHE_HOME="/proc/nowhere")
    _run_in_a_process(code, XDG_CACHE_HOME=str(tmp_path))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}
    for name in ("gather", "attend"):
        assert any(name in path.name for path in kept)
    _run_in_a_process(code, XDG_CACHE_HOME=str(tmp_path))
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}


def test_kernels_are_kept_by_all_that_they_are_made_of(tmp_path, monkeypatch) -> None:
    """A function that a kernel calls may stand in another file, which numba does not look at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = compiled._cache_directory()
    changed = tmp_path / "vectors.py"
    changed.write_text(Path(compiled.__file__).with_name("vectors.py").read_text() + "# one more line\n")
    monkeypatch.setattr(compiled, "_SOURCES", (*compiled._SOURCES[:-1], str(changed.with_suffix(""))))
    assert compiled._cache_directory() != before


def test_a_draw_is_that_of_the_plain_code(monkeypatch) -> None:
    scores = torch.randn(200, 517, generator=torch.Generator().manual_seed(3)) * 5
    scores[0, 100:] = -torch.inf
    params = [SamplingParams(temperature=0.0 if i % 5 == 0 else 1.0) for i in range(200)]
    batch, uniform = SamplingBatch.of(params), np.random.default_rng(0).random(200)
    uniform[:20] = 1 - 2.0**-53
    fast = sample(scores, batch, uniform)
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    plain = sample(scores, batch, uniform)
    assert fast.tokens == plain.tokens
    np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=1e-5)
    assert fast.tokens[0] < 100


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_lean_modules_keep_names_and_loading(tiny_model, tmp_path, architecture) -> None:
    model = load_model(tiny_model(architecture))
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [type(m).__name__ for m in model.model.layers.modules() if "Linear" not in type(m).__name__] == [
        type(m).__name__ for m in plain.model.layers.modules() if "Linear" not in type(m).__name__
    ]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(plain)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_packed_copies_follow_the_weights(tiny_model, architecture) -> None:
    """A small model's engine multiplies with copies of its weights: they are made anew when weights are loaded."""
    engine = TorchEngine(tiny_model(architecture), EngineConfig(num_threads=1))
    other = load_model(tiny_model(architecture))
    for parameter in other.parameters():
        parameter.data.mul_(torch.linspace(0.7, 1.3, parameter.shape[-1]))
    requests = [Request(str(i), tuple(range(5, 25 + i)), SamplingParams(max_tokens=8, seed=i)) for i in range(20)]
    before = generate(engine, requests)
    engine.load_weights(copy_parameters(other), 1)
    after = generate(engine, requests)
    fresh = tiny_model(architecture).parent / f"{architecture}-scaled"
    other.save_pretrained(fresh)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = tiny_model(architecture) / name
        if source.exists():
            (fresh / name).write_bytes(source.read_bytes())
    wanted = generate(TorchEngine(fresh, EngineConfig(num_threads=1)), requests)
    for key in wanted:
        assert after[key][0].token_ids.tolist() == wanted[key][0].token_ids.tolist()
        np.testing.assert_allclose(after[key][0].logprobs, wanted[key][0].logprobs, atol=1e-5)
    assert any(before[k][0].token_ids.tolist() != after[k][0].token_ids.tolist() for k in wanted)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_the_program_computes_what_the_modules_do(tiny_model, architecture, monkeypatch) -> None:
    prompts = [tuple(range(5, 25 + 9 * i)) for i in range(7)]
    config = EngineConfig(num_threads=2, max_num_seqs=4, max_num_batched_tokens=50)
    requests = [
        Request(str(i), p, SamplingParams(max_tokens=9, seed=i, prompt_logprobs=2 if i % 2 else None))
        for i, p in enumerate(prompts)
    ]
    ours = TorchEngine(tiny_model(architecture), config)
    assert ours.runner.runs_compiled
    monkeypatch.setattr("thornback.engine.decoder_program._MAX_PACKED", 0)
    plain = TorchEngine(tiny_model(architecture), config)
    assert not plain.runner.runs_compiled
    results = [generate(engine, requests) for engine in (ours, plain)]
    for key, (sample_,) in results[0].items():
        assert results[1][key][0].token_ids.tolist() == sample_.token_ids.tolist()
        np.testing.assert_allclose(results[1][key][0].logprobs, sample_.logprobs, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_long_prompts_beside_single_tokens(tiny_model, architecture, monkeypatch) -> None:
    """Many new tokens of a sequence are gathered for torch's kernel, few are read by ours; a pass may hold both."""
    requests = [
        Request(str(i), tuple(int(t) for t in range(4, 8 + 11 * (i % 4))), SamplingParams(max_tokens=3 + 2 * i, seed=i))
        for i in range(9)
    ]
    results = []
    for few in (1 << 30, 9, 1):
        monkeypatch.setattr("thornback.engine.attention._FEW", few)
        config = EngineConfig(num_threads=1, max_num_seqs=3, max_num_batched_tokens=24, enable_prefix_caching=False)
        results.append(generate(TorchEngine(tiny_model(architecture), config), requests))
    for other in results[1:]:
        for key, (sample_,) in results[0].items():
            assert other[key][0].token_ids.tolist() == sample_.token_ids.tolist()
            np.testing.assert_allclose(other[key][0].logprobs, sample_.logprobs, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_pass_that_goes_on_from_the_last_is_that_from_nothing(tiny_model, block_size, monkeypatch) -> None:
    """Most passes take over what the one before knew: also when sequences end, leave, wait, and start again."""
    results, advanced = [], []
    advance = PagedBatch.advance

    def counting(batch: PagedBatch, contexts: list[int], tables: list[list[int]]) -> bool:
        advanced.append(advance(batch, contexts, tables))
        return advanced[-1]

    for way in (counting, lambda *_: False):
        monkeypatch.setattr(PagedBatch, "advance", way)
        config = EngineConfig(
            num_threads=1, block_size=block_size, num_blocks=130 // block_size, max_num_seqs=4, max_num_batched_tokens=9
        )
        engine = TorchEngine(tiny_model("qwen3"), config)
        tokens: dict[str, list[int]] = {}
        for i in range(7):
            sampling = SamplingParams(max_tokens=11 + 7 * i, seed=i, ignore_eos=True)
            engine.add_request(Request(str(i), tuple(range(5, 7 + 5 * i)), sampling))
        for step in range(1000):
            if step == 20:
                engine.abort_request("3")
            if step in (30, 31, 60):
                engine.load_weights(copy_parameters(engine.model), step, "recompute" if step > 30 else "keep")
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if not engine.has_unfinished_requests():
                break
        assert not engine.has_unfinished_requests()
        results.append(tokens)
    assert results[0] == results[1]
    assert advanced.count(True) > 20


def test_kernels_hold_every_array_whose_address_they_take() -> None:
    """Or its memory may be another thread's before the kernel is done with it."""
    taken = 0
    for path in Path(kernels.__file__).parent.glob("*.py"):
        source = path.read_text()
        if "@Kernel(" in source and path.name != "compiled.py":
            names = re.findall(r"\b(\w+)\.ctypes\.data", source)
            taken += len(names)
            assert [name for name in names if f"hold({name})" not in source] == [], path.name
    assert taken >= 5
