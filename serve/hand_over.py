"""Prefilled requests on their way from one replica to another (FlowKV, papers.md section 4)."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import ray

from thornback.contracts import Engine, KVExport, KVImport, Reservation, TransferFailed, TransferStats
from thornback.serve.engine_loop import EngineLoop

FETCH_TIMEOUT_S = 30.0
IPC, OBJECT_STORE = "ipc", "object_store"
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class HandOver:
    """What a replica offers of a request that it has prefilled. `shipped`: a reference to its blocks in the object
    store, in a list, so that it travels as one; empty: they are to be read where they lie."""

    export: KVExport
    replica_id: str
    shipped: list[ray.ObjectRef]


class Receiver:
    """Fetches what is handed over into an engine's pool, outside of the engine's thread, and counts what it took."""

    def __init__(self, loop: EngineLoop) -> None:
        from thornback.engine import PeerPools

        self._loop, self._peers = loop, PeerPools()
        self.transfers: dict[str, TransferStats] = defaultdict(TransferStats)  # by the way that was taken
        self.num_failures = 0

    async def receive(self, hand_over: HandOver) -> KVImport | None:
        """The keys and values in blocks of the engine's own; None: there is no room for them, or they cannot be had,
        and the request is computed again."""
        taking = asyncio.ensure_future(self._take(hand_over))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            # It goes on: blocks that it has reserved and fills are not to be anybody else's meanwhile.
            taking.add_done_callback(lambda done: self.give_back(done.result()))
            raise

    def give_back(self, kv: KVImport | None) -> None:
        """Free what was reserved for a request that has not taken it."""
        if kv is not None and isinstance(kv.blocks, Reservation):
            self._release(kv.blocks)

    async def _take(self, hand_over: HandOver) -> KVImport | None:
        export = hand_over.export
        reservation = await self._loop.call(lambda engine: engine.reserve(export.num_tokens))
        if reservation is None:
            return None
        try:
            way, stats = await asyncio.to_thread(self._fetch, hand_over, reservation)
        except (TransferFailed, ray.exceptions.RayError) as error:
            self._release(reservation)
            self.num_failures += 1
            logger.warning("Request %s is computed again: %s", export.request_id, error)
            return None
        self.transfers[way] += stats
        return KVImport(export.num_tokens, reservation, export.weight_version, export.num_drafted_tokens, export.hidden)

    def _release(self, reservation: Reservation) -> None:
        self._loop.submit(lambda engine: engine.release(reservation.lease))

    def _fetch(self, hand_over: HandOver, reservation: Reservation) -> tuple[str, TransferStats]:
        engine: Any = self._loop.engine
        if not hand_over.shipped:
            return IPC, self._peers.pull(hand_over.export, engine.pool, reservation)
        from thornback.engine import write_runs

        parts = ray.get(hand_over.shipped[0], timeout=FETCH_TIMEOUT_S)
        return OBJECT_STORE, write_runs(parts, hand_over.export, engine.pool, reservation)


def put_export(engine: Engine, export: KVExport) -> list[ray.ObjectRef]:
    """Copy an export's blocks into the object store, and give its lease up. Between two steps of the engine."""
    from thornback.engine import read_runs

    reference = ray.put(read_runs(export, engine.pool))  # type: ignore[attr-defined]
    engine.release(export.lease)
    return [reference]
