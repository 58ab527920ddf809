"""The learner: one actor a rank, which turns rollouts with advantages into new weights."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import ray

from thornback.actors.specs import LearnerSpec, UpdateReport
from thornback.actors.supervision import Home
from thornback.contracts import RolloutBatch, TensorSpec

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from thornback.actors.rank import Meeting, Rank


class LearnerCore:
    """One rank as an actor. The driver loads this module, so torch is loaded by the methods; and the constructor
    does nothing, so that errors arrive as they were raised."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self.spec = spec
        self._number = rank
        self._store: TCPStore | None = None

    def home(self) -> Home:
        return Home.here()

    def rendezvous(self) -> Meeting:
        """On rank 0: open the store where the ranks meet; returns its host and port."""
        from thornback.actors.rank import open_store

        host = ray.util.get_node_ip_address()
        self._store = open_store(host, self.spec)
        return host, self._store.port

    def setup(self, meeting: Meeting | None = None, ranks_of_node: int = 1) -> Home:
        """Join the group (`meeting`: rank 0's rendezvous; None for a single rank) and load the model."""
        from thornback.actors.rank import Rank

        self.rank: Rank = Rank(self.spec, self._number, ranks_of_node, meeting, self._store)
        return Home.here()

    def update(self, step: int, advantages: np.ndarray, *batches: RolloutBatch) -> UpdateReport:
        """Train on the rollouts of `batches`, end to end, with one advantage each, float `[R]`.

        Every rank gets every batch (mapped, not copied) and takes its own share.
        """
        started = time.perf_counter()
        report = self.rank.update(RolloutBatch.concat(batches), advantages, step)
        report.seconds = time.perf_counter() - started
        return report

    @ray.method(num_returns=2)
    def weights(self) -> tuple[np.ndarray | None, tuple[TensorSpec, ...]]:
        """The weights as one buffer (None on ranks after the first) and its index; all ranks must be asked."""
        return self.rank.policy.publish(), self.rank.policy.index

    def save(self, location: str) -> None:
        """Write this rank's state into the directory `location`."""
        self.rank.save(location)

    def restore(self, location: str) -> None:
        """Read it back, exactly."""
        self.rank.restore(location)

    def export(self, location: str) -> None:
        """Write the model in Hugging Face layout into the directory `location`; all ranks must be asked."""
        self.rank.export(location)


Learner = ray.remote(LearnerCore)
