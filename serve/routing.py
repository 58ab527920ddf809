"""Sends a call to the replica that it names."""

from __future__ import annotations

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

PLACED = "replica_id"  # the keyword argument of a replica's methods that names it


class PlacedRouter(FIFOMixin, RequestRouter):
    """Calls with a `replica_id` go there, and, if it has gone, to any other: a replica says itself whether it is the
    one that can do it. All others go to the less loaded of two."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.kwargs.get(PLACED) if pending_request is not None else None
        named = [r for r in candidate_replicas if wanted and r.replica_id.unique_id == wanted]
        return [named or random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
