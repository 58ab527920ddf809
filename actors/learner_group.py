"""The learner's ranks as one thing: they start, work and fall together."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors.learner import Learner
from thornback.actors.specs import LearnerSpec, UpdateReport
from thornback.actors.supervision import DataLost, Home, LearnerLost, actor_options, is_lost, kill, original_error

MEANWHILE_SECONDS = 0.01
GRACE_SECONDS = 10.0  # a rank's error may be the echo of another rank's death, which Ray reports a moment later


class LearnerGroup:
    """All ranks of a learner. Every call reaches every rank; `LearnerLost` tells that the group must start again."""

    def __init__(
        self,
        spec: LearnerSpec,
        num_cpus: float = 0.0,
        num_gpus: float = 0.0,
        on_event: Callable[[str, str], None] = lambda kind, message: None,
    ) -> None:
        self.spec = spec
        self._on_event = on_event
        self._options = actor_options(num_cpus, num_gpus)
        self.meanwhile: Callable[[], None] | None = None  # called again and again while an update is waited for
        self.ranks: list[ActorHandle] = []
        self.homes: list[Home] = []

    def start(self) -> None:
        """Make the ranks (again), let them meet, and load the model on each."""
        self.shutdown()
        self.ranks = [Learner.options(**self._options).remote(self.spec, rank) for rank in range(self.spec.num_ranks)]
        self.homes = self._all([rank.home.remote() for rank in self.ranks], "starting")
        meeting = None
        if self.spec.num_ranks > 1:
            meeting = self._all([self.ranks[0].rendezvous.remote()], "opening the rendezvous")[0]
        neighbours = Counter(home.node for home in self.homes)
        setups = [
            rank.setup.remote(meeting, neighbours[home.node]) for rank, home in zip(self.ranks, self.homes, strict=True)
        ]
        self._all(setups, "loading the model")
        for rank in range(len(self.ranks)):
            self._on_event("actor_started", f"{self.name(rank)} is ready")

    def update(self, step: int, advantages: np.ndarray, batches: Sequence[ObjectRef]) -> UpdateReport:
        """One update on rollouts that lie in the object store; the first rank's report, which covers all."""
        calls = [rank.update.remote(step, advantages, *batches) for rank in self.ranks]
        return self._all(calls, f"updating at step {step}", self.meanwhile)[0]

    def save(self, location: str) -> None:
        """Write the ranks' state into the directory `location`, which exists."""
        self._all([rank.save.remote(location) for rank in self.ranks], f"saving to {location}")

    def restore(self, location: str) -> None:
        """Read it back."""
        self._all([rank.restore.remote(location) for rank in self.ranks], f"restoring from {location}")

    def export(self, location: str) -> None:
        """Write the model in Hugging Face layout into the directory `location`, which exists."""
        self._all([rank.export.remote(location) for rank in self.ranks], f"writing the model to {location}")

    def shutdown(self) -> None:
        for rank in self.ranks:
            kill(rank)
        self.ranks = []

    def _all(self, refs: list[ObjectRef], doing: str, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """Results of all ranks. The first failure ends the wait: the others hang in a collective then."""
        deadline = time.monotonic() + self.spec.timeout
        pending = list(refs)
        while pending:
            left = max(0.0, deadline - time.monotonic())
            timeout = left if meanwhile is None else min(left, MEANWHILE_SECONDS)
            ready, pending = ray.wait(pending, num_returns=1, timeout=timeout)
            if not ready and meanwhile is not None and left > 0:
                meanwhile()
                continue
            if not ready:
                late = refs.index(pending[0])
                raise LearnerLost(f"{self.name(late)} did not answer within {self.spec.timeout:.0f} s while {doing}")
            try:
                ray.get(ready[0])
            except Exception as error:
                self._raise(error, refs, refs.index(ready[0]), doing)
        return ray.get(refs)

    def _raise(self, error: Exception, refs: list[ObjectRef], rank: int, doing: str) -> None:
        if is_lost(error):
            raise LearnerLost(f"{self.name(rank)} died while {doing}") from error
        ray.wait(refs, num_returns=len(refs), timeout=GRACE_SECONDS if len(refs) > 1 else 0.0)
        for other, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=0)
            except Exception as second:
                if is_lost(second):
                    raise LearnerLost(f"{self.name(other)} died while {doing}") from second
        found = original_error(error)
        raise (LearnerLost(str(found)) if isinstance(found, DataLost) else found) from None

    def name(self, rank: int) -> str:
        where = f" ({self.homes[rank]})" if rank < len(self.homes) else ""
        return f"learner rank {rank}{where}"
