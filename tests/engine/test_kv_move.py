"""One request in two processes: its prompt is computed in one, its keys and values move, the other goes on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from thornback.contracts import EngineConfig, KVImport, Output, Request, SamplingParams
from thornback.engine import TorchEngine, generate, read_export

DEADLINE = 120.0  # seconds; a process imports torch first
BLOCKS = {"block_size": 8, "num_blocks": 64, "max_model_len": 256, "max_num_seqs": 8, "num_threads": 1}
PROMPT = tuple(int(t) for t in np.random.default_rng(3).integers(4, 118, size=101))
OTHERS = [tuple(int(t) for t in np.random.default_rng(s).integers(4, 118, size=37)) for s in range(3)]
SAMPLED = SamplingParams(max_tokens=24, ignore_eos=True, seed=11)
BRIEF = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.0)


def prefill(channel: Connection, model: str, pool: str) -> None:
    """A process of its own: computes the prompts that it is sent, hands out their exports, frees what is released."""
    engine = TorchEngine(model, EngineConfig(**BLOCKS, kv_location=pool))
    while (message := channel.recv()) is not None:
        kind, value = message
        if kind == "release":
            engine.release(value)
            channel.send(engine.load().num_free_blocks)
            continue
        for number, prompt in enumerate(OTHERS):  # so that the request's blocks do not begin at the pool's start
            engine.add_request(
                Request(f"other {number}", prompt, SamplingParams(max_tokens=8, ignore_eos=True, seed=1))
            )
        engine.add_request(value)
        outputs: list[Output] = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        channel.send([out for out in outputs if out.request_id == value.request_id])


@contextmanager
def prefill_process(model: Path, pool: Path) -> Iterator[Connection]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=prefill, args=(there, str(model), str(pool)))
    process.start()
    there.close()
    try:
        yield here
        here.send(None)
        process.join(DEADLINE)
        assert process.exitcode == 0
    finally:
        process.kill()


def answer(channel: Connection) -> object:
    assert channel.poll(DEADLINE), f"the prefill process did not answer within {DEADLINE:.0f} s"
    return channel.recv()


def test_a_request_begins_in_one_process_and_ends_in_another(tiny_model, tmp_path) -> None:
    model = tiny_model("qwen3", hidden_size=128, num_hidden_layers=3)
    engine = TorchEngine(model, EngineConfig(**BLOCKS))
    with prefill_process(model, tmp_path / "pool") as channel:
        for name, sampling in (("sampled", SAMPLED), ("greedy", GREEDY)):
            unsplit = generate(engine, [Request("unsplit", PROMPT, sampling)])["unsplit"][0]
            engine.flush_prefix_cache()
            channel.send(("prefill", Request(name, PROMPT, sampling, export_kv=True)))
            (first,) = answer(channel)
            tokens, logprobs = go_on(engine, Request(name, PROMPT, sampling), first)
            assert tokens == unsplit.token_ids.tolist()
            np.testing.assert_allclose(logprobs, unsplit.logprobs, atol=1e-5)
            channel.send(("release", first.kv.lease))
            assert answer(channel) == BLOCKS["num_blocks"]
    assert engine.load().num_free_blocks == BLOCKS["num_blocks"]


def go_on(engine: TorchEngine, request: Request, first: Output) -> tuple[list[int], list[float]]:
    """Take over what another process has begun: all tokens and log-probabilities of the request."""
    export = first.kv
    assert export is not None
    assert first.finish_reason is None
    blocks = read_export(export)  # out of the other process's pool, through the shared file
    assert blocks.any()
    moved = Request(request.request_id, PROMPT, request.sampling, output_token_ids=tuple(first.token_ids))
    engine.add_request(moved, KVImport(export.num_tokens, blocks, export.weight_version))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[0].num_cached_tokens == len(PROMPT), "the prompt was computed again"
    tokens = [*first.token_ids, *(t for out in outputs for t in out.token_ids)]
    return tokens, [*first.logprobs, *(p for out in outputs for p in out.logprobs)]
