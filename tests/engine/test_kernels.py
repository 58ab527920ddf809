"""The compiled kernels compute what the same formula in torch does, and the lean modules what transformers' do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from thornback.contracts import EngineConfig, Request, SamplingParams
from thornback.engine import TorchEngine, copy_parameters, generate, kernels, load_model
from thornback.engine.sampler import SamplingBatch, sample

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
    kernels.paged_attention(query, pool, 1, tokens, owners, lengths, tables, window, 0.3, out)
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


def test_store_writes_where_slots_point() -> None:
    pool = torch.zeros(6, 2, 2, 3, 4, 8)
    both = torch.randn(5, 6, 8)
    keys, values = both[:, :3], both[:, 3:]
    places = [(4, 1), (0, 0), (5, 3), (2, 2), (0, 1)]  # block, row in it
    slots = torch.tensor([(block * 2 * 2 * 3 + head) * 4 + row for block, row in places for head in range(3)])
    kernels.store(keys, values, pool, slots, 1)
    for i, (block, row) in enumerate(places):
        torch.testing.assert_close(pool[block, 1, 0, :, row], keys[i])
        torch.testing.assert_close(pool[block, 1, 1, :, row], values[i])
    assert int((pool != 0).sum()) == both.numel()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_norm_rotation_and_silu(scale) -> None:
    x, weight = torch.randn(37, 6, 24) * scale, torch.randn(24)
    wanted = functional.rms_norm(x, (24,), weight, 1e-6)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6), wanted, rtol=1e-5, atol=1e-5)
    angles = torch.randn(37, 12)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    for given, start in ((weight, wanted), (None, x)):
        left, right = start.chunk(2, -1)
        rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
        inside = torch.cat([x, x], 1)  # a slice: tokens lie apart
        kernels.rotate(inside[:, :6], angles.cos(), angles.sin(), given, 1e-6)
        torch.testing.assert_close(inside[:, :6], rotated, rtol=1e-5, atol=1e-4)
        assert (inside[:, 6:] == x).all()
    both = torch.randn(37, 200) * scale
    gate, up = both.split(100, -1)
    torch.testing.assert_close(kernels.silu_product(gate, up), functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


def test_a_draw_is_that_of_the_plain_code(monkeypatch) -> None:
    scores = torch.randn(200, 517, generator=torch.Generator().manual_seed(3)) * 5
    scores[0, 100:] = -torch.inf
    params = [SamplingParams(temperature=0.0 if i % 5 == 0 else 1.0) for i in range(200)]
    batch = SamplingBatch(params, np.random.default_rng(0).random(200))
    batch.uniform[:20] = 1 - 2.0**-53
    fast = sample(scores, batch)
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    plain = sample(scores, batch)
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
def test_ordered_copies_follow_the_weights(tiny_model, architecture, monkeypatch) -> None:
    """A small model's engine multiplies with copies of its weights: they are made anew when weights are loaded."""
    monkeypatch.setattr("thornback.engine.linear._MIN_PRODUCT", 1)
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
