"""Blocks that an engine holds for somebody who is to fetch them, for a time."""

from __future__ import annotations

import time
import uuid

from thornback.contracts import Lease
from thornback.engine.block_manager import BlockManager


class Leases:
    """What is offered, until it is released or its time is over: what a dead peer held is freed then."""

    def __init__(self, blocks: BlockManager, seconds: float) -> None:
        self._blocks, self._seconds = blocks, seconds
        self._held: dict[str, tuple[Lease, list[int]]] = {}

    def offer(self, blocks: list[int]) -> Lease:
        """Hold blocks beside whoever else holds them."""
        self._blocks.share(blocks)
        lease = Lease(uuid.uuid4().hex, time.time() + self._seconds)
        self._held[lease.lease_id] = (lease, blocks)
        return lease

    def release(self, lease: Lease) -> None:
        _, blocks = self._held.pop(lease.lease_id, (lease, []))
        self._blocks.release(blocks)

    def expire(self) -> None:
        now = time.time()
        for lease in [lease for lease, _ in self._held.values() if lease.expires_at <= now]:
            self.release(lease)
