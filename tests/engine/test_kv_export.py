"""Keys and values that leave one engine and go on in another."""

from __future__ import annotations

import time

import pytest

from tests.engine.contract import PROMPTS
from tests.engine.hand_over import PARAMS, SIZES, prefilled
from thornback.contracts import MIXED_VERSIONS, EngineConfig, KVImport, Request
from thornback.engine import TorchEngine, copy_parameters, generate, read_export


@pytest.fixture
def engines(tiny_model, tmp_path):
    location = str(tmp_path / "pool")
    prefill = TorchEngine(tiny_model("qwen3"), EngineConfig(**SIZES, kv_location=location, lease_seconds=0.3))
    return prefill, TorchEngine(tiny_model("qwen3"), EngineConfig(**SIZES))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_request_moves_between_engines(engines, prompt) -> None:
    prefill, decode = engines
    wanted = generate(decode, [Request("w", prompt, PARAMS)])["w"][0].token_ids.tolist()
    decode.flush_prefix_cache()
    out = prefilled(prefill, "p", prompt)
    assert out.finish_reason is None
    export = out.kv
    assert len(export.runs) == 1  # the segment allocator gave it one run
    assert (export.num_tokens, export.token_ids) == (len(prompt), (*prompt, *out.token_ids))
    kv = KVImport(export.num_tokens, read_export(export), export.weight_version)
    prefill.release(export.lease)
    assert prefill.load().num_free_blocks == 48
    request = Request("d", prompt, PARAMS, output_token_ids=tuple(out.token_ids))
    decode.add_request(request, kv)
    first = decode.step()[0]
    assert first.num_cached_tokens == len(prompt)  # nothing of the prompt was computed again
    rest = [*first.token_ids]
    while decode.has_unfinished_requests():
        rest += [t for o in decode.step() for t in o.token_ids]
    assert out.token_ids + rest == wanted
    assert decode.load().num_free_blocks == 48


def test_a_lease_that_nobody_releases_ends(engines) -> None:
    prefill, _ = engines
    prefilled(prefill, "p", PROMPTS[3])
    assert prefill.load().num_free_blocks == 48 - 10
    time.sleep(0.35)
    assert prefill.load().num_free_blocks == 48


def test_keys_and_values_of_other_weights_are_computed_again(engines) -> None:
    prefill, decode = engines
    out = prefilled(prefill, "p", PROMPTS[3])
    blocks = read_export(out.kv)
    blocks.fill(9.0)  # would spoil the answer if it were used
    decode.load_weights(copy_parameters(decode.model), version=1)
    wanted = generate(decode, [Request("w", PROMPTS[3], PARAMS)])["w"][0].token_ids.tolist()
    request = Request("d", PROMPTS[3], PARAMS, output_token_ids=tuple(out.token_ids))
    decode.add_request(request, KVImport(out.kv.num_tokens, blocks, weight_version=0))
    rest = []
    while decode.has_unfinished_requests():
        rest += [t for o in decode.step() for t in o.token_ids]
    assert out.token_ids + rest == wanted


def test_keys_and_values_of_several_weights_are_nobodys(engines) -> None:
    prefill, _ = engines
    prefill.scheduler.max_num_batched_tokens = 16
    prefill.add_request(Request("p", PROMPTS[3], PARAMS, export_kv=True))
    assert prefill.step() == []  # a part of the prompt
    prefill.load_weights(copy_parameters(prefill.model), version=1, in_flight="keep")
    outputs = []
    while prefill.has_unfinished_requests():
        outputs += prefill.step()
    assert outputs[-1].kv.weight_version == MIXED_VERSIONS
    prefill.release(outputs[-1].kv.lease)
    assert prefilled(prefill, "q", PROMPTS[3]).kv.weight_version == 1
