"""The learner: one actor a rank, which turns rollouts with advantages into new weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import ray
import torch
from torch import distributed

from thornback.actors.learner_state import export_model, restore_state, save_state
from thornback.actors.optimizer import Optimizer, OptimizerSpec
from thornback.actors.policy import Policy, PolicySpec
from thornback.actors.supervision import Home, use_threads
from thornback.actors.update import Updater, UpdateReport, UpdateSpec
from thornback.contracts import RolloutBatch, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """What a learner group is made of. `num_threads` None: the node's cores, shared by its ranks."""

    policy: PolicySpec
    optimizer: OptimizerSpec
    update: UpdateSpec
    num_ranks: int = 1
    num_threads: int | None = None
    timeout: float = 600.0


class LearnerCore:
    """One rank. Its constructor cannot fail: `setup` does the work, so that its errors arrive as they are."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self.spec = spec
        self.rank = rank

    def rendezvous(self) -> tuple[str, int]:
        """On rank 0: open the store where the ranks meet; returns its host and port."""
        host = ray.util.get_node_ip_address()
        self._store = distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self._timeout)
        return host, self._store.port

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self.spec.timeout)

    def home(self) -> Home:
        return Home.here()

    def setup(self, meeting: tuple[str, int] | None = None, ranks_of_node: int = 1) -> Home:
        """Join the group (`meeting`: rank 0's rendezvous; None for a single rank) and load the model."""
        use_threads(self.spec.num_threads, share=ranks_of_node)
        if meeting is not None:
            host, port = meeting
            store = self._store if self.rank == 0 else distributed.TCPStore(host, port, timeout=self._timeout)
            backend = "nccl" if torch.cuda.is_available() and self.spec.policy.device != "cpu" else "gloo"
            distributed.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.spec.num_ranks, timeout=self._timeout
            )
        self.policy = Policy(self.spec.policy, self.spec.num_ranks)
        self.optimizer = Optimizer(self.policy.trained.values(), self.spec.optimizer)
        self.updater = Updater(self.policy, self.optimizer, self.spec.update, self.rank, self.spec.num_ranks)
        return Home.here()

    def update(self, step: int, advantages: np.ndarray, *batches: RolloutBatch) -> UpdateReport:
        """Train on the rollouts of `batches`, end to end, with one advantage each, float `[R]`.

        Every rank gets every batch (mapped, not copied) and takes its own share.
        """
        started = time.perf_counter()
        report = self.updater.run(RolloutBatch.concat(batches), advantages, step)
        report.seconds = time.perf_counter() - started
        return report

    @ray.method(num_returns=2)
    def weights(self) -> tuple[np.ndarray | None, tuple[TensorSpec, ...]]:
        """The weights as one buffer (None on ranks after the first) and its index; all ranks must be asked."""
        return self.policy.publish(), self.policy.index

    def save(self, location: str) -> None:
        """Write this rank's state into the directory `location`."""
        save_state(location, self.rank, self.policy, self.optimizer)

    def restore(self, location: str) -> None:
        """Read it back, exactly."""
        restore_state(location, self.rank, self.policy, self.optimizer)

    def export(self, location: str) -> None:
        """Write the model in Hugging Face layout into the directory `location`; all ranks must be asked."""
        export_model(location, self.policy)


Learner = ray.remote(LearnerCore)
