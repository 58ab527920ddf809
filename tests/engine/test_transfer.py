"""Keys and values that go from one process' pool to another's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.engine.contract import PROMPTS
from tests.engine.hand_over import PARAMS, SIZES, prefilled
from thornback.contracts import (
    SHARED,
    BlockRun,
    ConfigError,
    EngineConfig,
    KVExport,
    KVImport,
    Lease,
    Request,
    Reservation,
    TransferFailed,
)
from thornback.engine import (
    KVPool,
    PeerPools,
    TorchEngine,
    copy_parameters,
    generate,
    pool_exists,
    read_runs,
    write_runs,
)

SHAPE = (2, 2, 3, 4, 8)  # layers, keys and values, heads, tokens, width


def pool(num_blocks=16, shape=SHAPE, dtype=torch.float32, location=SHARED) -> KVPool:
    made = KVPool(num_blocks, shape, dtype, torch.device("cpu"), location)
    made.tensor.copy_(torch.randn(made.tensor.shape))
    return made


def offered(source: KVPool, *runs: tuple[int, int], seconds: float = 60.0) -> KVExport:
    runs = tuple(BlockRun(*run) for run in runs)
    lease = Lease("lease", time.time() + seconds)
    return KVExport("r", (1, 2), 1, runs, source.location, lease, source.dtype, source.block_shape, 0)


def reserved(*blocks: int, seconds: float = 60.0) -> Reservation:
    return Reservation(Lease("mine", time.time() + seconds), blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_that_both_sides_have_are_one_copy_each(dtype) -> None:
    source, target = pool(dtype=dtype), pool(dtype=dtype)
    before = target.tensor.clone()
    stats = PeerPools().pull(offered(source, (2, 3), (9, 2)), target, reserved(4, 5, 6, 7, 1))
    assert (stats.num_transfers, stats.num_calls) == (1, 3)  # 2-4 to 4-6, 9 to 7, 10 to 1
    assert stats.num_bytes == 5 * 2 * 2 * 3 * 4 * 8 * source.tensor.element_size()
    assert torch.equal(target.tensor[[4, 5, 6, 7, 1]], source.tensor[[2, 3, 4, 9, 10]])
    others = [0, 2, 3, *range(8, 16)]
    assert torch.equal(target.tensor[others], before[others])


def test_layers_that_only_one_side_has_are_left_out() -> None:
    source, target = pool(shape=(3, *SHAPE[1:])), pool()
    PeerPools().pull(offered(source, (1, 2)), target, reserved(3, 8))
    assert torch.equal(target.tensor[[3, 8]], source.tensor[[1, 2], :2])
    with_head = pool(shape=(3, *SHAPE[1:]))
    kept = with_head.tensor[:, 2].clone()
    PeerPools().pull(offered(target, (3, 1)), with_head, reserved(5))
    assert torch.equal(with_head.tensor[5, :2], target.tensor[3])
    assert torch.equal(with_head.tensor[:, 2], kept)


def test_what_went_through_the_object_store_is_the_same() -> None:
    source, target = pool(location=""), pool(location="")
    export = offered(source, (2, 3), (9, 2))
    parts = read_runs(export, source)
    assert [part.shape for part in parts] == [(3, *SHAPE), (2, *SHAPE)]
    assert all(np.shares_memory(part, source.rows) for part in parts)
    for part in parts:
        part.flags.writeable = False  # as the object store hands them out
    stats = write_runs(parts, export, target, reserved(4, 5, 6, 7, 1))
    assert (stats.num_transfers, stats.num_calls, stats.num_bytes) == (1, 3, 5 * source.rows.shape[1])
    assert torch.equal(target.tensor[[4, 5, 6, 7, 1]], source.tensor[[2, 3, 4, 9, 10]])
    with pytest.raises(TransferFailed, match="waited too long"):
        write_runs(parts, export, target, reserved(4, 5, 6, 7, 1, seconds=-1))


def test_pools_that_do_not_fit_are_refused() -> None:
    source = pool()
    for other in (pool(dtype=torch.bfloat16), pool(shape=(2, 2, 3, 8, 8))):
        with pytest.raises(TransferFailed, match="do not fit"):
            PeerPools().pull(offered(source, (0, 1)), other, reserved(0))


def test_a_pool_on_another_device_is_not_put_into_shared_memory() -> None:
    with pytest.raises(ConfigError, match="cannot be shared"):
        KVPool(4, SHAPE, torch.float32, torch.device("meta"), SHARED)


def test_a_private_pool_cannot_be_reached() -> None:
    with pytest.raises(TransferFailed, match="private"):
        PeerPools().pull(offered(pool(location=""), (0, 1)), pool(), reserved(0))


def test_nothing_is_worth_anything_after_a_lease() -> None:
    source, target = pool(), pool()
    before = target.tensor.clone()
    with pytest.raises(TransferFailed, match="waited too long"):
        PeerPools().pull(offered(source, (0, 4)), target, reserved(0, 1, 2, 3, seconds=-1))
    assert torch.equal(target.tensor, before)  # they may be somebody else's by now
    with pytest.raises(TransferFailed, match="given up"):
        PeerPools().pull(offered(source, (0, 4), seconds=-1), target, reserved(0, 1, 2, 3))


OWNER = """
import sys, torch
from thornback.contracts import SHARED
from thornback.engine import KVPool
pool = KVPool(4, (2, 2, 3, 4, 8), torch.float32, torch.device("cpu"), SHARED)
pool.tensor.fill_(7.0)
print(pool.location, flush=True)
sys.stdin.read()
"""


def test_the_memory_of_a_killed_process_is_gone_and_what_was_mapped_stays() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    location = owner.stdout.readline().strip()
    target, peers = pool(), PeerPools()
    export = replace(offered(target, (1, 2)), location=location)
    peers.pull(export, target, reserved(5, 6))
    assert (target.tensor[5:7] == 7.0).all()
    assert pool_exists(location)
    owner.kill()
    owner.wait()
    assert not pool_exists(location)
    peers.pull(export, target, reserved(8, 9))  # in the middle of a transfer, nobody's memory goes away
    assert (target.tensor[8:10] == 7.0).all()
    with pytest.raises(TransferFailed, match="owner is gone"):
        PeerPools().pull(export, target, reserved(0, 1))


def test_another_file_of_the_same_number_is_not_taken_for_a_pool(tmp_path) -> None:
    source = pool()
    path, _, name = source.location.partition("#")
    assert pool_exists(source.location)
    assert not pool_exists(f"{path}#{name[:-1]}x")
    assert str(os.getpid()) in path


@pytest.fixture
def engines(tiny_model):
    config = EngineConfig(**SIZES, kv_location=SHARED, lease_seconds=0.3)
    return TorchEngine(tiny_model("qwen3"), config), TorchEngine(tiny_model("qwen3"), EngineConfig(**SIZES))


def taken_over(decode, out):
    """The import of an export whose blocks have arrived."""
    reservation = decode.reserve(out.kv.num_tokens)
    PeerPools().pull(out.kv, decode.pool, reservation)
    return KVImport(out.kv.num_tokens, reservation, out.kv.weight_version)


def rest_of(decode, prompt, out, kv) -> list[int]:
    decode.add_request(Request("d", prompt, PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    rest = []
    while decode.has_unfinished_requests():
        rest += [t for o in decode.step() for t in o.token_ids]
    return rest


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_request_goes_on_in_blocks_that_were_filled_for_it(engines, prompt) -> None:
    prefill, decode = engines
    wanted = generate(decode, [Request("w", prompt, PARAMS)])["w"][0].token_ids.tolist()
    decode.flush_prefix_cache()
    out = prefilled(prefill, "p", prompt)
    kv = taken_over(decode, out)
    prefill.release(out.kv.lease)
    decode.add_request(Request("d", prompt, PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    first = decode.step()[0]
    assert first.num_cached_tokens == len(prompt)  # nothing of the prompt was computed again
    rest = [*first.token_ids]
    while decode.has_unfinished_requests():
        rest += [t for o in decode.step() for t in o.token_ids]
    assert out.token_ids + rest == wanted
    assert decode.load().num_free_blocks == prefill.load().num_free_blocks == 48


def test_reserved_blocks_that_nobody_takes_are_freed(engines, monkeypatch) -> None:
    _, decode = engines
    first, second = decode.reserve(20), decode.reserve(20)
    assert len(first.blocks) == 5
    assert not set(first.blocks) & set(second.blocks)
    assert decode.load().num_free_blocks == 38
    assert decode.reserve(4 * 39) is None
    decode.release(first.lease)
    assert decode.load().num_free_blocks == 43
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: second.lease.expires_at + 1)
    assert decode.load().num_free_blocks == 43  # who fills them may not have looked at the clock yet
    monkeypatch.setattr(time, "time", lambda: second.lease.expires_at + 6)
    assert decode.load().num_free_blocks == 48
    monkeypatch.setattr(time, "time", lambda: now)


def test_a_reservation_that_was_given_up_is_computed_again(engines) -> None:
    prefill, decode = engines
    prompt = PROMPTS[3]
    wanted = generate(decode, [Request("w", prompt, PARAMS)])["w"][0].token_ids.tolist()
    out = prefilled(prefill, "p", prompt)
    kv = taken_over(decode, out)
    decode.release(kv.blocks.lease)
    decode.pool.tensor.fill_(9.0)  # would spoil the answer
    decode.flush_prefix_cache()
    assert out.token_ids + rest_of(decode, prompt, out, kv) == wanted
    assert decode.load().num_free_blocks == 48


def test_other_weights_make_what_arrived_worthless(engines) -> None:
    prefill, decode = engines
    prompt = PROMPTS[3]
    out = prefilled(prefill, "p", prompt)
    kv = taken_over(decode, out)
    decode.add_request(Request("d", prompt, PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    decode.load_weights(copy_parameters(decode.model), version=1, in_flight="keep")
    decode.pool.tensor.fill_(9.0)
    rest = []
    while decode.has_unfinished_requests():
        rest += [t for o in decode.step() for t in o.token_ids]
    wanted = generate(decode, [Request("w", prompt, PARAMS)])["w"][0].token_ids.tolist()
    assert out.token_ids + rest == wanted
    late = taken_over(decode, out)  # of version 0
    assert out.token_ids + rest_of(decode, prompt, out, late) == wanted
    assert decode.load().num_free_blocks == 48


def test_arrivals_that_wait_do_not_block_each_other(engines) -> None:
    """As many requests as fill the pool with what has arrived: there is no room to go on, until some start over."""
    prefill, decode = engines
    prompt = tuple(range(1, 49))  # twelve blocks
    outs = [prefilled(prefill, f"p{i}", prompt) for i in range(4)]
    wanted = generate(prefill, [Request("w", prompt, PARAMS)])["w"][0].token_ids.tolist()
    for i, out in enumerate(outs):
        kv = taken_over(decode, out)
        decode.add_request(Request(f"d{i}", prompt, PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    assert decode.load().num_free_blocks == 0
    rest: dict[str, list[int]] = {f"d{i}": [] for i in range(4)}
    for _ in range(200):
        for output in decode.step():
            rest[output.request_id] += output.token_ids
    assert not decode.has_unfinished_requests()
    assert all(outs[0].token_ids + tokens == wanted for tokens in rest.values())
    assert decode.load().num_free_blocks == 48


def test_arrivals_that_wait_do_not_block_a_request_before_them(engines) -> None:
    prefill, decode = engines
    prompt, other = tuple(range(1, 49)), tuple(range(50, 98))
    wanted = generate(prefill, [Request("w", other, PARAMS)])["w"][0].token_ids.tolist()
    arrivals = []
    for i in range(4):
        out = prefilled(prefill, f"p{i}", prompt)
        arrivals.append((out, taken_over(decode, out)))
        prefill.release(out.kv.lease)
    assert decode.load().num_free_blocks == 0
    decode.add_request(Request("plain", other, PARAMS))
    for i, (out, kv) in enumerate(arrivals):
        decode.add_request(Request(f"d{i}", prompt, PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    said: list[int] = []
    for _ in range(200):
        said += [t for output in decode.step() if output.request_id == "plain" for t in output.token_ids]
    assert said == wanted
    assert not decode.has_unfinished_requests()
    assert decode.load().num_free_blocks == 48


def test_a_request_that_is_aborted_before_it_runs_frees_what_arrived(engines) -> None:
    prefill, decode = engines
    out = prefilled(prefill, "p", PROMPTS[3])
    kv = taken_over(decode, out)
    decode.add_request(Request("d", PROMPTS[3], PARAMS, output_token_ids=tuple(out.token_ids)), kv)
    decode.abort_request("d")
    assert decode.load().num_free_blocks == 48
    assert not decode.has_unfinished_requests()


def test_what_a_pool_says_of_its_memory() -> None:
    made = pool(num_blocks=3)
    assert made.rows.shape == (3, 2 * 2 * 3 * 4 * 8 * 4)
    made.rows[1] = 0
    assert not made.tensor[1].any()
    assert np.shares_memory(made.rows, made.tensor.numpy())
