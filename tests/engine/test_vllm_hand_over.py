"""Keys and values that leave vLLM and come back to it.

Runs where vLLM is installed, which is the benchmarks' environment: `make test-vllm`. A process has one connector: the
engine hands over to itself here, and to others in tests/serve/test_vllm.py.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from tests.engine.contract import PROMPTS
from tests.engine.hand_over import PARAMS, prefilled
from tests.engine.test_vllm_engine import SIZES
from tests.vllm import NEEDS_VLLM
from thornback.contracts import (
    MIXED_VERSIONS,
    SHARED,
    EngineConfig,
    InvalidRequest,
    KVImport,
    Request,
    SamplingParams,
    TransferFailed,
)
from thornback.engine import PeerPools, TorchEngine, generate, read_export, read_runs, write_runs
from thornback.engine.model import load_model
from thornback.engine.vllm_engine import VllmEngine
from thornback.engine.weights import copy_parameters

pytestmark = NEEDS_VLLM
ROOM = 5  # requests like LONG, that are staged at once
LONG = tuple(np.random.default_rng(0).integers(5, 60, 77).tolist())


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3", **SIZES)


@pytest.fixture(scope="module")
def torch_engine(model) -> TorchEngine:
    return TorchEngine(model, EngineConfig(num_threads=1))


@pytest.fixture(scope="module")
def shared(model):
    config = EngineConfig(
        max_num_seqs=4,
        max_model_len=128,
        max_num_batched_tokens=32,  # a long prompt takes several passes
        kv_cache_memory_bytes=1 << 28,
        num_threads=1,
        kv_location=SHARED,
        lease_seconds=1.0,
    )
    yield VllmEngine(str(model), config)
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()


@pytest.fixture
def engine(shared):
    yield shared
    load = shared.load()
    assert load.num_free_blocks == load.num_blocks
    assert not shared.has_unfinished_requests()
    assert shared.staging.num_free_blocks == len(shared.pool.tensor), "staged blocks were leaked"


def wanted(torch_engine, prompt, params=PARAMS) -> list[int]:
    return generate(torch_engine, [Request("w", prompt, params)])["w"][0].token_ids.tolist()


def pulled(engine, export) -> KVImport:
    """What a replica does with an export."""
    reservation = engine.reserve(export.num_tokens)
    stats = PeerPools().pull(export, engine.pool, reservation)
    assert stats.num_calls == len(export.runs) == 1  # one copy, whatever number of layers
    engine.release(export.lease)
    return KVImport(export.num_tokens, reservation, export.weight_version)


def rest_of(engine, request, kv=None) -> tuple[list[int], int]:
    """Its further tokens, and how many it had not to compute."""
    engine.add_request(request, kv)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return [token for output in outputs for token in output.token_ids], outputs[0].num_cached_tokens


@pytest.mark.parametrize("prompt", [*PROMPTS, LONG])
def test_a_request_moves(engine, torch_engine, prompt) -> None:
    out = prefilled(engine, "p", prompt)
    assert out.finish_reason is None
    export = out.kv
    assert (export.num_tokens, export.token_ids) == (len(prompt), (*prompt, *out.token_ids))
    engine.flush_prefix_cache()
    kv = pulled(engine, export)
    request = Request("d", prompt, PARAMS, output_token_ids=tuple(out.token_ids))
    rest, num_cached = rest_of(engine, request, kv)
    assert num_cached == len(prompt)  # nothing of the prompt was computed again
    assert out.token_ids + rest == wanted(torch_engine, prompt)


def test_what_was_cached_here_is_not_loaded_again(engine, torch_engine) -> None:
    generate(engine, [Request("before", LONG, PARAMS)])
    out = prefilled(engine, "p", LONG)
    assert out.num_cached_tokens == 64  # whole blocks
    kv = pulled(engine, out.kv)
    engine.pool.tensor[list(kv.blocks.blocks[:2])] = 9.0  # would spoil the answer if they were read
    request = Request("d", LONG, PARAMS, output_token_ids=tuple(out.token_ids))
    rest, num_cached = rest_of(engine, request, kv)
    assert num_cached == len(LONG)
    assert out.token_ids + rest == wanted(torch_engine, LONG)
    engine.flush_prefix_cache()


def test_by_a_copy_and_by_the_object_store(engine, torch_engine) -> None:
    out = prefilled(engine, "p", LONG)
    engine.flush_prefix_cache()
    request = Request("d", LONG, PARAMS, output_token_ids=tuple(out.token_ids))
    kv = KVImport(out.kv.num_tokens, read_export(out.kv), out.kv.weight_version)
    assert rest_of(engine, request, kv) == (wanted(torch_engine, LONG)[1:], len(LONG))
    parts = [part.copy() for part in read_runs(out.kv, engine.pool)]
    engine.release(out.kv.lease)
    engine.flush_prefix_cache()
    reservation = engine.reserve(len(LONG))
    write_runs(parts, out.kv, engine.pool, reservation)
    kv = KVImport(out.kv.num_tokens, reservation, out.kv.weight_version)
    assert rest_of(engine, request, kv) == (wanted(torch_engine, LONG)[1:], len(LONG))


def test_a_request_that_ends_with_its_first_token_hands_nothing_over(engine) -> None:
    engine.add_request(Request("one", LONG, SamplingParams(max_tokens=1, seed=0, ignore_eos=True), export_kv=True))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[-1].finish_reason == "length"
    assert outputs[-1].kv is None


def test_a_lease_that_nobody_releases_ends(engine) -> None:
    prefilled(engine, "p", LONG)
    assert engine.staging.num_free_blocks == len(engine.pool.tensor) - 3
    time.sleep(1.1)
    engine.step()


def test_who_finds_no_room_waits_for_a_lease_to_end(engine) -> None:
    names = [str(i) for i in range(8)]
    for name in names:
        engine.add_request(Request(name, LONG, PARAMS, export_kv=True))
    assert engine.load().num_waiting - len(engine._llm.engine_core.engine_core.scheduler.waiting) == 8 - ROOM
    engine.abort_request("7")
    found = {}
    deadline = time.monotonic() + 20
    while engine.has_unfinished_requests():
        assert time.monotonic() < deadline
        found |= {output.request_id: output for output in engine.step()}
    assert set(found) == set(names[:-1])
    assert len({found[name].token_ids[0] for name in found}) == 1
    for output in found.values():
        engine.release(output.kv.lease)
    engine.flush_prefix_cache()


def test_an_aborted_request_gives_back_what_had_come(engine) -> None:
    out = prefilled(engine, "p", LONG)
    kv = pulled(engine, out.kv)
    engine.add_request(Request("d", LONG, PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    engine.abort_request("d")
    for steps in range(3):  # and so one that is to hand over, between two parts of its prompt
        engine.add_request(Request("e", LONG, PARAMS, export_kv=True))
        for _ in range(steps):
            engine.step()
        engine.abort_request("e")
        engine.flush_prefix_cache()


def test_keys_and_values_of_other_weights_are_computed_again(engine, torch_engine, model) -> None:
    out = prefilled(engine, "p", LONG)
    kv = pulled(engine, out.kv)
    engine.pool.tensor[list(kv.blocks.blocks)] = 9.0  # would spoil the answer if it were used
    weights = copy_parameters(load_model(model))
    request = Request("d", LONG, PARAMS, output_token_ids=tuple(out.token_ids))
    engine.load_weights(weights, version=1)
    assert rest_of(engine, request, kv) == (wanted(torch_engine, LONG)[1:], 0)
    kv = pulled(engine, prefilled(engine, "p", LONG).kv)
    engine.flush_prefix_cache()
    engine.pool.tensor[list(kv.blocks.blocks)] = 9.0
    engine.add_request(request, kv)
    engine.load_weights(weights, version=2, in_flight="recompute")  # while it waits
    rest = []
    while engine.has_unfinished_requests():
        rest += [token for output in engine.step() for token in output.token_ids]
    assert rest == wanted(torch_engine, LONG)[1:]


@pytest.mark.parametrize("in_flight", ["keep", "recompute"])
def test_weights_that_come_in_the_middle_of_a_prompt(engine, model, tiny_model, in_flight) -> None:
    engine.add_request(Request("p", LONG, PARAMS, export_kv=True))
    assert engine.step() == []  # a part of it
    version = engine.load().weight_version + 1
    engine.load_weights(copy_parameters(load_model(tiny_model("qwen3", **SIZES, seed=1))), version, in_flight)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    export = outputs[-1].kv
    assert export.weight_version == (MIXED_VERSIONS if in_flight == "keep" else version)
    kv = pulled(engine, export)
    engine.flush_prefix_cache()
    request = Request("d", LONG, PARAMS, output_token_ids=tuple(outputs[-1].token_ids))
    _, num_cached = rest_of(engine, request, kv)
    assert num_cached == (0 if in_flight == "keep" else len(LONG))  # what is mixed is computed again
    engine.load_weights(copy_parameters(load_model(model)), version + 1)


def test_an_arrival_that_leaves_nothing_to_compute_is_not_used(engine, torch_engine) -> None:
    kv = pulled(engine, prefilled(engine, "p", LONG).kv)
    engine.flush_prefix_cache()
    assert rest_of(engine, Request("d", LONG, PARAMS), kv) == (wanted(torch_engine, LONG), 0)


def test_blocks_of_another_layout_are_refused(engine) -> None:
    export = prefilled(engine, "p", LONG).kv
    assert "vLLM" in export.layout
    reservation = engine.reserve(export.num_tokens)
    with pytest.raises(TransferFailed, match="serve one model with one engine"):
        PeerPools().pull(replace(export, layout=""), engine.pool, reservation)
    engine.release(reservation.lease)
    engine.release(export.lease)


def test_several_samples_are_not_handed_over(engine) -> None:
    with pytest.raises(InvalidRequest, match="n = 1"):
        engine.add_request(Request("n", LONG, SamplingParams(n=2, max_tokens=4), export_kv=True))
