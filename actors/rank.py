"""One rank of a learner: its process group, its model, its optimizer, and what they do. Ray is not known here."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import torch
from torch import distributed

from thornback.actors.learner_state import export_model, restore_state, save_state
from thornback.actors.optimizer import Optimizer
from thornback.actors.policy import Policy
from thornback.actors.specs import LearnerSpec, UpdateReport
from thornback.actors.supervision import use_threads
from thornback.actors.update import Updater
from thornback.contracts import RolloutBatch

Meeting = tuple[str, int]  # host and port of the store where the ranks meet


def open_store(host: str, spec: LearnerSpec) -> distributed.TCPStore:
    """The store where the ranks meet, on a free port, which rank 0 keeps."""
    timeout = timedelta(seconds=spec.timeout)
    return distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)


class Rank:
    """Joins the group through `store` (rank 0) or `meeting` (the others), or works alone without either."""

    def __init__(
        self,
        spec: LearnerSpec,
        rank: int,
        ranks_of_node: int = 1,
        meeting: Meeting | None = None,
        store: distributed.TCPStore | None = None,
    ) -> None:
        use_threads(spec.num_threads, share=ranks_of_node)
        if meeting is not None:
            timeout = timedelta(seconds=spec.timeout)
            on_gpu = torch.cuda.is_available() and spec.policy.device != "cpu"
            distributed.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store or distributed.TCPStore(*meeting, timeout=timeout),
                rank=rank,
                world_size=spec.num_ranks,
                timeout=timeout,
            )
        self.rank = rank
        self.policy = Policy(spec.policy, spec.num_ranks)
        self.optimizer = Optimizer(self.policy.trained.values(), spec.optimizer)
        self._updater = Updater(self.policy, self.optimizer, spec.update, rank, spec.num_ranks)

    def update(self, batch: RolloutBatch, advantages: np.ndarray, step: int) -> UpdateReport:
        """See `Updater.run`."""
        return self._updater.run(batch, advantages, step)

    def save(self, location: str) -> None:
        save_state(location, self.rank, self.policy, self.optimizer)

    def restore(self, location: str) -> None:
        restore_state(location, self.rank, self.policy, self.optimizer)

    def export(self, location: str) -> None:
        export_model(location, self.policy)
