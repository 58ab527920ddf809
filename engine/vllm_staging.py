"""The pool by which a vLLM engine hands keys and values over, and whose blocks of it are whose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch

from thornback.algorithms import runs_of
from thornback.contracts import MIXED_VERSIONS, BlockRun, EngineConfig, KVExport, KVImport, Lease, Request, Reservation
from thornback.engine.block_manager import BlockManager
from thornback.engine.kv_pool import KVPool
from thornback.engine.leases import Leases

_SEQUENCES = 16  # of the longest so many fit,
_SHARE = 2  # but one, at least, and no more than the cache's memory over this holds


class Staging:
    """Beside vLLM's cache: what is handed out lies here until its lease ends, what comes until vLLM has read it."""

    def __init__(self, llm: Any, config: EngineConfig, max_model_len: int) -> None:
        block_shape, dtype, layout = llm.collective_rpc("kv_layout")[0]
        longest = -(-max_model_len // config.block_size)
        room = config.kv_cache_memory_bytes // _SHARE // (prod(block_shape) * dtype.itemsize)
        num_blocks = max(longest, min(longest * min(_SEQUENCES, config.max_num_seqs), room))
        self.pool = KVPool(num_blocks, block_shape, dtype, torch.device("cpu"), config.kv_location, layout)
        llm.collective_rpc("stage", args=(self.pool.tensor,))
        self._blocks = BlockManager(num_blocks, config.block_size, enable_prefix_caching=False)
        self._leases = Leases(self._blocks, config.lease_seconds)
        self._held: dict[str, list[int]] = {}  # blocks that unfinished requests read or write, by request
        self._mixed: set[str] = set()  # those of them whose keys and values are of several weights

    def prepare(self, request: Request) -> dict[str, Any] | None:
        """vLLM's `kv_transfer_params` of a request that is to hand over; None: there is no room yet."""
        needed = self._blocks.blocks_for(len(request.prompt_token_ids) + len(request.output_token_ids))
        if needed > self._blocks.num_free:
            return None
        self._held[request.request_id] = self._blocks.allocate(needed)
        return {"save": self._held[request.request_id]}

    def export(self, request: Request, drawn: Sequence[int], version: int) -> KVExport:
        """Offer what a request has written, under a lease."""
        blocks = self._held[request.request_id]
        tokens = (*request.prompt_token_ids, *request.output_token_ids)
        return KVExport(
            request_id=request.request_id,
            token_ids=(*tokens, *drawn),
            num_tokens=len(tokens),
            runs=tuple(BlockRun(*run) for run in runs_of(blocks)),
            location=self.pool.location,
            lease=self._leases.offer(blocks),
            dtype=self.pool.dtype,
            block_shape=self.pool.block_shape,
            weight_version=MIXED_VERSIONS if request.request_id in self._mixed else version,
            layout=self.pool.layout,
        )

    def receive(self, request: Request, kv: KVImport | None, version: int) -> dict[str, Any] | None:
        """vLLM's `kv_transfer_params` of a request that goes on with what has arrived; None: it is computed here."""
        if kv is None:
            return None
        if isinstance(kv.blocks, np.ndarray):
            reservation = self.reserve(kv.num_tokens)
            if reservation is None:
                return None
            self.pool.write(reservation.blocks, kv.blocks)
            kv = replace(kv, blocks=reservation)
        assert isinstance(kv.blocks, Reservation)
        blocks = self._leases.take(kv.blocks)
        rest = len(request.prompt_token_ids) + len(request.output_token_ids) - kv.num_tokens
        # Given up meanwhile, or of other weights; and vLLM must be left a token to compute.
        if blocks is None or kv.weight_version != version or rest < 1:
            self._blocks.release(blocks or [])
            return None
        self._held[request.request_id] = blocks
        return {"load": blocks, "num_tokens": kv.num_tokens}

    def forget(self, request_id: str) -> None:
        """A request has read or written its blocks, or is gone."""
        self._blocks.release(self._held.pop(request_id, []))
        self._mixed.discard(request_id)

    def mix(self) -> None:
        """Unfinished requests go on under other weights, with the keys and values that they have."""
        self._mixed = set(self._held)

    def reserve(self, num_tokens: int) -> Reservation | None:
        self.expire()
        return self._leases.reserve(self._blocks.blocks_for(num_tokens))

    def release(self, lease: Lease) -> None:
        self._leases.release(lease)

    def expire(self) -> None:
        self._leases.expire()

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free
