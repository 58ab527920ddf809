"""Blocks that an engine holds for somebody who is to read or to fill them, for a time."""

from __future__ import annotations

import time
import uuid

from thornback.contracts import Lease, Reservation
from thornback.engine.block_manager import BlockManager

GRACE_SECONDS = 5.0  # after the end of a lease, in which who still fills its blocks sees that it is over


class Leases:
    """What is offered or reserved, until it is released or its time is over: what a dead peer held is freed then."""

    def __init__(self, blocks: BlockManager, seconds: float) -> None:
        self._blocks, self._seconds = blocks, seconds
        self._held: dict[str, tuple[float, list[int]]] = {}  # by lease: when they are freed, and the blocks

    def offer(self, blocks: list[int]) -> Lease:
        """Let blocks be read, beside whoever else holds them."""
        self._blocks.share(blocks)
        return self._hold(blocks, 0.0)

    def reserve(self, num_blocks: int) -> Reservation | None:
        """Blocks to be filled, if so many are free."""
        if num_blocks > self._blocks.num_free:
            return None
        blocks = self._blocks.allocate(num_blocks)
        return Reservation(self._hold(blocks, GRACE_SECONDS), tuple(blocks))

    def _hold(self, blocks: list[int], grace: float) -> Lease:
        lease = Lease(uuid.uuid4().hex, time.time() + self._seconds)
        self._held[lease.lease_id] = lease.expires_at + grace, blocks
        return lease

    def take(self, reservation: Reservation) -> list[int] | None:
        """The reserved blocks, which are the taker's from now on; None: they were freed already."""
        _, blocks = self._held.pop(reservation.lease.lease_id, (0.0, None))
        return blocks

    def release(self, lease: Lease) -> None:
        _, blocks = self._held.pop(lease.lease_id, (0.0, []))
        self._blocks.release(blocks)

    def expire(self) -> None:
        now = time.time()
        for lease_id in [lease_id for lease_id, (end, _) in self._held.items() if end <= now]:
            self._blocks.release(self._held.pop(lease_id)[1])
