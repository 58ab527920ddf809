"""Speculation in rollouts, as the driver sees it: what passes cost, and which rollouts the workers guess from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors import ActorPool, RolloutSpec
from thornback.contracts import SpeculationConfig
from thornback.train.checkpoint import Checkpoint
from thornback.train.config import RunConfig
from thornback.train.run_directory import RunDirectory

REFERENCE = "reference_rollouts"  # of pre-sampling: a directory of Parquet files
COSTS_FILE = "speculation.json"
MEMORY_FILE = "memory.parquet"  # of a checkpoint


class RolloutSpeculation:
    """Keeps all rollout workers at one memory and one set of costs.

    Guesses change no token, but the last bits of log-probabilities. So that a run can repeat itself, they are a
    function of its state: costs are measured once in its life, and memory is what a checkpoint holds, or the
    reference rollouts of the run's beginning, and the steps since then.
    """

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        self._rasd = config.rollout.rasd
        self._run = run
        self._costs: tuple[tuple[int, float], ...] = ()
        self._location: str | None = None
        self._since: list[ObjectRef] = []  # what came after `_location`

    def spec(self, plain: RolloutSpec) -> RolloutSpec:
        """A worker's, that speculates."""
        rasd = self._rasd
        guessing = SpeculationConfig(num_nodes=rasd.num_nodes, max_sequences=rasd.max_sequences, draft=rasd.draft)
        return replace(
            plain,
            engine_config=replace(plain.engine_config, speculation=guessing),
            memory_tokens=rasd.max_tokens,
        )

    def resume(self, workers: ActorPool, checkpoint: Checkpoint | None) -> None:
        """Bring every worker to a checkpoint's memory, or to that of the run's beginning."""
        costs = self._costs or self._read_costs() or self._measure_costs(workers)
        if checkpoint is not None:
            location: str | None = f"{checkpoint.location}/{MEMORY_FILE}"
        else:
            location = self._run.at(REFERENCE) if self._run.exists(REFERENCE) else None
            source = location or "nothing at first: it has no reference rollouts"
            self._run.event("speculation", f"this run's rollouts are guessed from {source}")
        self._costs, self._location, self._since = costs, location, []
        workers.broadcast("recall", (costs, location), "recalling earlier rollouts")

    def remember(self, workers: ActorPool, batches: Sequence[ObjectRef], doing: str) -> None:
        """Let every worker guess from these rollouts too."""
        self._since += batches
        workers.broadcast("remember", tuple(batches), f"remembering rollouts of {doing}")

    def save(self, workers: ActorPool, location: str) -> None:
        """Write the memory, which is every worker's, into the directory `location`."""
        workers.map("save_memory", [(f"{location}/{MEMORY_FILE}",)], f"saving to {location}")

    def rely_on(self, location: str) -> None:
        """A checkpoint is whole: what is remembered is there, and the object store may drop it."""
        self._location, self._since = f"{location}/{MEMORY_FILE}", []

    def catch_up(self, worker: ActorHandle) -> list[ObjectRef]:
        """Bring a new worker to the others' memory."""
        return [worker.recall.remote(self._costs, self._location, *self._since)] if self._costs else []

    def _read_costs(self) -> tuple[tuple[int, float], ...]:
        text = self._run.read_text(COSTS_FILE)
        return () if text is None else tuple((int(tokens), seconds) for tokens, seconds in json.loads(text)["costs"])

    def _measure_costs(self, workers: ActorPool) -> tuple[tuple[int, float], ...]:
        """What passes cost one of the workers, for the whole life of the run."""
        (costs,) = workers.map("costs", [()], "measuring what passes cost")
        self._run.write_text(COSTS_FILE, json.dumps({"costs": costs}))
        return costs
