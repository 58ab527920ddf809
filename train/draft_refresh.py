"""The draft head of a run's rollouts, as the driver sees it: where it is, and that it follows the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors import (
    ActorPool,
    DraftLearner,
    DraftLearnerSpec,
    DraftReport,
    PublishedWeights,
    Restarts,
    actor_options,
)
from thornback.train.checkpoint import Checkpoint
from thornback.train.config import RunConfig
from thornback.train.prompts import seed_of


@dataclass(frozen=True, slots=True)
class DraftState:
    """A head in the object store: parameters and AdamW's moments, flat buffers of one layout `index`."""

    weights: ObjectRef
    index: ObjectRef
    moments: ObjectRef
    num_updates: int


class DraftRefresh:
    """One draft learner, and what it works on. The state lies in the object store, not in the actor: one that is lost
    costs no more than its unfinished work. Where the state is lost too, with its node, `DataLost` tells so, and a
    checkpoint has it.

    A head is a function of the run's state: of the policy, of the rollouts since the last refresh, and of the step.
    """

    def __init__(self, config: RunConfig, model: str, restarts: Restarts) -> None:
        rasd = config.rollout.rasd
        self._every, self._max_tokens, self._seed = rasd.draft_refresh_every, rasd.max_tokens, config.run.seed
        spec = DraftLearnerSpec(
            model=model,
            draft=rasd.draft,
            updates=rasd.draft_refresh_updates,
            learning_rate=rasd.draft_learning_rate,
            max_tokens=rasd.max_tokens,
            num_threads=config.learner.num_threads,
        )
        learner_class = DraftLearner.options(**actor_options(num_gpus=rasd.draft_num_gpus))
        self._learner = ActorPool(
            "draft learner",
            lambda _: learner_class.remote(spec),
            1,
            timeout=config.run.timeout_seconds,
            restarts=restarts,
        )
        self._state: DraftState | None = None
        self._fresh: list[tuple[int, ObjectRef]] = []  # rollouts since the last refresh, with their tokens

    def wait_ready(self) -> None:
        self._learner.wait_ready()

    def resume(self, workers: ActorPool, checkpoint: Checkpoint | None) -> None:
        """Bring the head, everywhere, to where a checkpoint has it, or to the run's beginning."""
        location = None if checkpoint is None else checkpoint.location
        doing = "reading the draft head" if location is None else f"restoring from {location}"
        ((weights, index, moments, rollouts, report),) = self._learner.map("restore", [(location,)], doing)
        self._state = DraftState(weights, index, moments, report.num_updates)
        # Those count for nothing, since nobody has counted them here: others are dropped later for that.
        self._fresh = [(0, rollouts)] if report.num_rollouts else []
        self._load(workers)

    def remember(self, batches: Sequence[ObjectRef], num_tokens: int) -> None:
        """Let the head learn from these rollouts of so many tokens, when its time comes."""
        self._fresh += [(num_tokens if number == 0 else 0, batch) for number, batch in enumerate(batches)]
        # The learner takes the newest of all: what it cannot want need not be kept.
        while sum(tokens for tokens, _ in self._fresh[1:]) >= self._max_tokens:
            self._fresh.pop(0)

    def is_due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def refresh(self, workers: ActorPool, policy: PublishedWeights, step: int, doing: str) -> dict[str, float]:
        """Let the head learn what the policy says, and bring it to every worker; returns metrics."""
        state = self._state
        assert state is not None
        seed = seed_of(self._seed, "draft", step)
        batches = [batch for _, batch in self._fresh]
        call = (seed, state.num_updates, state.weights, state.moments, policy.buffer, policy.index, *batches)
        ((weights, moments, report),) = self._learner.map("refresh", [call], f"refreshing the draft head of {doing}")
        assert isinstance(report, DraftReport)
        self._state = replace(state, weights=weights, moments=moments, num_updates=report.num_updates)
        self._fresh = []
        self._load(workers)
        return {"rollout/draft_agreement": report.agreement}

    def _load(self, workers: ActorPool) -> None:
        assert self._state is not None
        workers.broadcast("load_draft", (self._state.weights, self._state.index), "loading the draft head")

    def save(self, location: str) -> None:
        """Write the head's part of a checkpoint into the directory `location`."""
        state = self._state
        assert state is not None
        call = (location, state.num_updates, state.weights, state.moments, *(batch for _, batch in self._fresh))
        self._learner.map("save", [call], f"saving to {location}")

    def catch_up(self, worker: ActorHandle) -> list[ObjectRef]:
        """Bring a new worker to the head of the others."""
        return [] if self._state is None else [worker.load_draft.remote(self._state.weights, self._state.index)]

    def shutdown(self) -> None:
        self._learner.shutdown()
