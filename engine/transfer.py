"""Keys and values that go from pool to pool: each run of blocks that is contiguous on both sides is one copy (FlowKV,
papers.md section 4)."""

from __future__ import annotations

import math
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from thornback.algorithms import align_runs
from thornback.contracts import STORAGE_DTYPES, BlockRun, KVExport, Reservation, TransferFailed, TransferStats
from thornback.engine.kv_pool import KVPool, pool_exists

# Copied between two looks at the leases. Not fewer: of much memory memcpy writes past the caches, half as fast again.
_CHUNK_BYTES = 1 << 30


class PeerPools:
    """The pools of other processes of this machine, mapped when they are first read from. Safe in several threads."""

    def __init__(self) -> None:
        self._rows: dict[str, np.ndarray] = {}

    def rows(self, export: KVExport) -> np.ndarray:
        """The pool of an export, uint8 `[num_blocks, bytes of a block]`. Raises `TransferFailed` if it is gone."""
        if export.location not in self._rows:
            for gone in [location for location in self._rows if not pool_exists(location)]:
                self._rows.pop(gone, None)
            self._rows[export.location] = _mapped(export).reshape(-1, block_bytes(export))
        return self._rows[export.location]

    def pull(self, export: KVExport, pool: KVPool, reservation: Reservation) -> TransferStats:
        """Copy an export into the blocks that were reserved for it. Raises `TransferFailed` where it cannot be read, or
        where a lease ended meanwhile: what was copied is worth nothing then."""
        started = time.perf_counter()
        stats = copy_blocks(self.rows(export), export, pool, reservation)
        if time.time() > export.lease.expires_at:
            raise TransferFailed(f"The keys and values of request {export.request_id} were given up by their owner.")
        return replace(stats, seconds=time.perf_counter() - started)


def read_runs(export: KVExport, pool: KVPool) -> list[np.ndarray]:
    """Each run of an export's blocks as it lies in the exporting engine's pool, `[length, *block_shape]` (bfloat16 as
    uint16), not copied: what goes through the object store. Good until the lease is released."""
    shape, dtype = export.block_shape, np.dtype(STORAGE_DTYPES[export.dtype])
    parts = (pool.rows[run.start : run.start + run.length] for run in export.runs)
    return [part.view(dtype).reshape(len(part), *shape) for part in parts]


def read_export(export: KVExport) -> np.ndarray:
    """A copy of the blocks that another process exports, `[num_blocks, *block_shape]`: see `KVImport`."""
    rows = _mapped(export).reshape(-1, block_bytes(export))
    whole = rows[np.array(blocks_of(export))]
    return whole.view(np.dtype(STORAGE_DTYPES[export.dtype])).reshape(len(whole), *export.block_shape)


def write_runs(parts: Sequence[np.ndarray], export: KVExport, pool: KVPool, reservation: Reservation) -> TransferStats:
    """Copy what `read_runs` has made of an export into the blocks that were reserved for it. Raises `TransferFailed` as
    `PeerPools.pull` does."""
    started, stats, at = time.perf_counter(), TransferStats(1), 0
    for part in parts:
        rows, blocks = part.reshape(len(part), -1).view(np.uint8), reservation.blocks[at : at + len(part)]
        of_part = replace(export, runs=(BlockRun(0, len(part)),))
        copied = copy_blocks(rows, of_part, pool, replace(reservation, blocks=blocks))
        stats, at = stats + replace(copied, num_transfers=0), at + len(part)
    return replace(stats, seconds=time.perf_counter() - started)


def copy_blocks(rows: np.ndarray, export: KVExport, pool: KVPool, reservation: Reservation) -> TransferStats:
    """Copy the export's blocks, which lie in `rows` uint8 `[N, bytes of a block]`, into reserved ones."""
    _check(export, pool)
    runs = align_runs(blocks_of(export), reservation.blocks)
    theirs, ours = rows, pool.rows
    if export.block_shape != pool.block_shape:  # the layers that both have
        layers = min(export.block_shape[0], pool.block_shape[0])
        theirs = rows.reshape(len(rows), export.block_shape[0], -1)[:, :layers]
        ours = ours.reshape(len(ours), pool.block_shape[0], -1)[:, :layers]
    step = max(1, _CHUNK_BYTES // rows.shape[1])
    for source, target, length in runs:
        for at in range(0, length, step):
            if time.time() > reservation.lease.expires_at:
                raise TransferFailed(f"Request {export.request_id} has waited too long for its keys and values.")
            stop = min(at + step, length)
            ours[target + at : target + stop] = theirs[source + at : source + stop]
    moved = sum(length for *_, length in runs) * math.prod(ours.shape[1:])
    return TransferStats(1, len(runs), moved)


def blocks_of(export: KVExport) -> Sequence[int]:
    return [block for run in export.runs for block in range(run.start, run.start + run.length)]


def block_bytes(export: KVExport) -> int:
    return math.prod(export.block_shape) * np.dtype(STORAGE_DTYPES[export.dtype]).itemsize


def _check(export: KVExport, pool: KVPool) -> None:
    theirs, ours = ((side.dtype, side.block_shape[1:], side.layout or "the torch engine's") for side in (export, pool))
    if theirs != ours:
        raise TransferFailed(
            f"Keys and values of {theirs} do not fit a pool of {ours}: serve one model with one engine, block_size and "
            "dtype, on machines of one kind."
        )


def _mapped(export: KVExport) -> np.ndarray:
    """The memory of a pool's file, uint8."""
    problem: object = "it is private, or its owner is gone"
    try:
        if pool_exists(export.location):
            descriptor = os.open(export.location.partition("#")[0], os.O_RDONLY)
            try:
                return np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
            finally:
                os.close(descriptor)
    except (OSError, ValueError) as error:
        problem = error
    raise TransferFailed(
        f"The pool {export.location} with the keys and values of request {export.request_id} cannot be read: {problem}."
    )
