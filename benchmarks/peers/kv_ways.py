"""Ways to move the blocks of a request from one process' pool into another's, over three transports."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.harness import PeerFailed
from thornback.algorithms import align_runs, runs_of
from thornback.contracts import SHARED, BlockRun, KVExport, Lease, Reservation
from thornback.engine import KVPool, PeerPools, read_runs, write_runs

LAYERS, HEADS, WIDTH, BLOCK_SIZE = 32, 8, 128, 32
SHAPE = (LAYERS, 2, HEADS, BLOCK_SIZE, WIDTH)
BLOCK_BYTES = 2 * int(np.prod(SHAPE))  # bfloat16
NAMES = ("blockwise", "layerwise", "merged", "layout", "allocator", "alignment")
WAIT_SECONDS = 120.0
EMPTY = 255  # no block of a sender's pool holds this alone


Blocks = Sequence[int]
Way = Callable[[list[int], list[int]], int]  # moves the blocks of one to those of the other; how many calls that was
Ways = tuple[dict[str, Way], np.ndarray]  # and the receiver's memory


def outgoing(way: str, rows: np.ndarray, source: Blocks, target: Blocks, staging: np.ndarray) -> Iterator[np.ndarray]:
    """What is called for, piece by piece, of a pool `rows` uint8 `[N, BLOCK_BYTES]`."""
    layers, size = by_layer(rows), len(source)
    if way == "blockwise":
        for layer in layers:
            yield from (layer[block] for block in source)
    elif way == "layerwise":
        for layer in layers:
            yield np.take(
                layer, source, 0, out=by_layer(staging)[0, :size], mode="clip"
            ).ravel()  # (raise: another copy)
    elif way == "merged":
        yield np.take(rows, source, 0, out=staging[:size], mode="clip").ravel()
    elif way == "layout":
        yield from (rows[block] for block in source)
    elif way == "allocator":
        yield from (rows[start : start + length].ravel() for start, length in runs_of(source))
    elif way == "alignment":
        yield from (rows[start : start + length].ravel() for start, _, length in align_runs(source, target))
    else:  # as many bytes, in one piece
        yield rows[:size].ravel()


def incoming(way: str, rows: np.ndarray, source: Blocks, target: Blocks, staging: np.ndarray) -> Iterator[np.ndarray]:
    """Where the pieces of `outgoing` go; what was gathered is scattered once it has come."""
    layers, size = by_layer(rows), len(source)
    if way == "blockwise":
        for layer in layers:
            yield from (layer[block] for block in target)
    elif way == "layerwise":
        for layer in layers:
            part = by_layer(staging)[0, :size]
            yield part.ravel()
            layer[target] = part
    elif way == "merged":
        yield staging[:size].ravel()
        rows[target] = staging[:size]
    elif way == "layout":
        yield from (rows[block] for block in target)
    elif way == "allocator":
        at = 0
        for _, length in runs_of(source):
            yield staging[at : at + length].ravel()
            rows[target[at : at + length]] = staging[at : at + length]
            at += length
    elif way == "alignment":
        yield from (rows[start : start + length].ravel() for _, start, length in align_runs(source, target))
    else:
        yield rows[:size].ravel()


def by_layer(rows: np.ndarray) -> np.ndarray:
    """A pool's memory with layers, and keys and values apart, outermost: how engines had it before FlowKV."""
    return rows.reshape(2 * LAYERS, len(rows), -1)


def make_pool(num_blocks: int, location: str = SHARED) -> KVPool:
    """With contents, so that its memory is there."""
    pool = KVPool(num_blocks, SHAPE, torch.bfloat16, torch.device("cpu"), location)
    fill(pool.rows)
    return pool


def fill(rows: np.ndarray) -> None:
    """What a sender's pool holds: every block something else, and every layer of it."""
    rows[:] = np.arange(len(rows), dtype=np.uint8)[:, None]
    rows.reshape(len(rows), 2 * LAYERS, -1)[:, :, 0] = np.arange(2 * LAYERS, dtype=np.uint8)


def export_of(location: str, blocks: Blocks) -> KVExport:
    runs = tuple(BlockRun(*run) for run in runs_of(blocks))
    lease = Lease("", time.time() + WAIT_SECONDS)
    return KVExport("", (), 0, runs, location, lease, "bfloat16", SHAPE, 0)


def _reservation(blocks: Blocks) -> Reservation:
    return Reservation(Lease("", time.time() + WAIT_SECONDS), tuple(blocks))


@contextmanager
def ipc(num_blocks: int) -> Iterator[Ways]:
    """The sender's pool is mapped, and read where it lies. `alignment` is what replicas do."""
    with _process(_own_pool, num_blocks) as pipe:
        location = pipe.recv()
        peers, pool = PeerPools(), make_pool(num_blocks)
        theirs, ours = peers.rows(export_of(location, [0])), pool.rows
        out, into = (np.zeros((num_blocks, BLOCK_BYTES), np.uint8) for _ in range(2))

        def copy(way: str) -> Way:
            def go(source: list[int], target: list[int]) -> int:
                calls = 0
                sent = outgoing(way, theirs, source, target, out)
                for piece, place in zip(sent, incoming(way, ours, source, target, into), strict=True):
                    place[:] = piece
                    calls += 1
                return calls

            return go

        def pull(source: list[int], target: list[int]) -> int:
            return peers.pull(export_of(location, source), pool, _reservation(target)).num_calls

        yield {name: copy(name) for name in (*NAMES, "memcpy")} | {"alignment": pull}, ours


def _own_pool(pipe: Any, num_blocks: int) -> None:
    pool = make_pool(num_blocks)
    pipe.send(pool.location)
    pipe.recv()


@contextmanager
def gloo(num_blocks: int) -> Iterator[Ways]:
    """A message for each piece, between two processes of a torch.distributed group."""
    import torch.distributed as dist

    with _process(_send_over_gloo, num_blocks) as pipe:
        dist.init_process_group("gloo", init_method=pipe.recv(), rank=0, world_size=2)
        rows = make_pool(num_blocks, "").rows
        staging = np.zeros((num_blocks, BLOCK_BYTES), np.uint8)

        def receive(way: str) -> Way:
            def go(source: list[int], target: list[int]) -> int:
                pipe.send((way, source, target))
                calls = 0
                for place in incoming(way, rows, source, target, staging):
                    dist.recv(torch.from_numpy(place), 1)
                    calls += 1
                return calls

            return go

        try:
            yield {name: receive(name) for name in (*NAMES, "one message")}, rows
        finally:
            pipe.send(None)
            dist.destroy_process_group()


def _send_over_gloo(pipe: Any, num_blocks: int) -> None:
    import socket

    import torch.distributed as dist

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        method = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    rows, staging = make_pool(num_blocks, "").rows, np.zeros((num_blocks, BLOCK_BYTES), np.uint8)
    pipe.send(method)
    dist.init_process_group("gloo", init_method=method, rank=1, world_size=2)
    while (work := pipe.recv()) is not None:
        way, source, target = work
        for piece in outgoing(way, rows, source, target, staging):
            dist.send(torch.from_numpy(piece), 0)
    dist.destroy_process_group()


@contextmanager
def object_store(num_blocks: int) -> Iterator[Ways]:
    """Put by an actor, got and written by this process: `alignment` as replicas of different machines do it,
    `blockwise` an object for each block."""
    import ray

    ray.init(
        num_cpus=2,
        object_store_memory=4 << 30,
        include_dashboard=False,
        log_to_driver=False,
        # Else the first use of pages is what is timed. A variable would be found by Rays that start later, too.
        _system_config={"preallocate_plasma_memory": True},
    )
    try:
        sender = ray.remote(_Sender).remote(num_blocks)
        pool = make_pool(num_blocks, "")

        def whole(source: list[int], target: list[int]) -> int:
            (reference,) = ray.get(sender.put.remote(source), timeout=WAIT_SECONDS)
            parts = ray.get(reference, timeout=WAIT_SECONDS)
            return write_runs(parts, export_of("", source), pool, _reservation(target)).num_calls

        def each(source: list[int], target: list[int]) -> int:
            references = ray.get(sender.put_each.remote(source), timeout=WAIT_SECONDS)
            for block, part in zip(target, ray.get(references, timeout=WAIT_SECONDS), strict=True):
                pool.rows[block] = part
            return len(references)

        yield {"blockwise": each, "alignment": whole}, pool.rows
    finally:
        ray.shutdown()


class _Sender:
    def __init__(self, num_blocks: int) -> None:
        self._pool = make_pool(num_blocks, "")

    def put(self, source: list[int]) -> list[Any]:
        import ray

        return [ray.put(read_runs(export_of("", source), self._pool))]

    def put_each(self, source: list[int]) -> list[Any]:
        import ray

        return [ray.put(self._pool.rows[block]) for block in source]


@contextmanager
def _process(work: Callable[[Any, int], None], num_blocks: int) -> Iterator[Any]:
    """Another process that does `work`, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=work, args=(its, num_blocks), daemon=True)
    process.start()
    try:
        if not mine.poll(WAIT_SECONDS):
            raise PeerFailed("The process with the other pool did not start.")
        yield mine
    finally:
        process.kill()
        process.join()


TRANSPORTS = {"ipc": ipc, "gloo": gloo, "object store": object_store}
