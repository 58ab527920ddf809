"""Rollouts that run ahead of the learner, within a bound: workers go on while it updates, and take new weights as they
go.

The prompt stream's positions are begun in order, each as a group of rollouts. A step trains on the oldest groups that
are done and judged; where groups end out of order, so are they trained. Each position is trained once, also where a
worker is lost or the run is resumed: what was not trained by then is begun again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from thornback.actors import LOST_CALL, DataLost, Flight, GenerationReport, GroupReport, PublishedWeights, RewardTable
from thornback.contracts import CACHED_VERSION, ActorLost, Anchor, SamplingParams
from thornback.train.config import RunConfig
from thornback.train.crew import Crew, Rollouts
from thornback.train.prompts import PromptBatch, PromptSource

CALLS_QUEUED = 3  # on each worker, so that it goes on while the driver does something else


@dataclass(slots=True, eq=False)
class _Group:
    """The rollouts of one prompt, at a position of the stream; begun under weights of `version`."""

    position: int
    prompt: PromptBatch
    number: int = 0
    version: int = 0
    batch: ObjectRef | None = None
    report: GroupReport | None = None
    table: RewardTable | None = None


@dataclass(slots=True)
class _Worker:
    """What a worker has to do: groups to begin with the next call, and those that were begun, by number."""

    actor: ActorHandle
    to_begin: list[_Group] = field(default_factory=list)
    begun: dict[int, _Group] = field(default_factory=dict)
    calls: deque[Flight] = field(default_factory=deque)
    others: list[Flight] = field(default_factory=list)  # calls that return nothing

    @property
    def num_groups(self) -> int:
        return len(self.to_begin) + len(self.begun)


class RolloutsAhead:
    """`pump` hands out work and takes what has come of it; whoever waits for something else calls it meanwhile."""

    def __init__(self, config: RunConfig, crew: Crew, prompts: PromptSource, sampling: SamplingParams) -> None:
        self._crew = crew
        self._prompts = prompts
        self._sampling = sampling
        self._max_staleness = config.rollout.max_staleness
        self._constants = config.rollout.ahead
        self._end = config.run.steps * prompts.per_step  # what this run trains
        self._timeout = config.run.timeout_seconds
        self._with_prompts = crew.episodes is not None
        self._workers: dict[int, _Worker] = {}  # those that are ready, by number
        self._waiting: list[_Group] = []  # for a worker
        self._version = 0  # of the weights that workers are told of
        self._scoring: dict[int, tuple[Flight, list[_Group]]] = {}  # by judge
        self._anchors: Mapping[str, Anchor] | None = None
        self._next, self._number, self._num_late = 0, 0, 0
        self._heard = 0.0  # when something came back last
        self._oldest = 0  # version that may have begun what is trained
        self._unjudged: list[_Group] = []
        self._ready: list[_Group] = []

    # A run's life

    def start(self, state: Mapping[str, Any] | None, anchors: Mapping[str, Anchor] | None, version: int) -> None:
        """Begin, or go on from what `state` returned; all workers have weights of `version`, and nothing to do."""
        self._version, self._anchors = version, anchors
        self._next = state["next"] if state else 0
        self._waiting = [self._group_at(position) for position in (state["open"] if state else ())]
        self.pump()

    def stop(self) -> None:
        """Give up all that is under way; workers may take weights then that they would not take in between."""
        self._workers, self._scoring = {}, {}
        self._waiting, self._unjudged, self._ready = [], [], []
        self._num_late, self._oldest = 0, 0
        self._crew.workers.broadcast("drop", (), "giving up rollouts")

    def state(self) -> dict[str, Any]:
        """Where the stream is: its next position, and those before it that were not trained."""
        return {"next": self._next, "open": sorted(group.position for group in self._all())}

    def use(self, anchors: Mapping[str, Anchor] | None) -> None:
        """Other anchors, for groups that begin from now on."""
        self._anchors = anchors

    def tell(self, weights: PublishedWeights) -> None:
        """Let every worker take new weights, between two passes."""
        arguments = (weights.buffer, weights.index, weights.version, self._constants.in_flight)
        self._version = weights.version
        for number, worker in self._workers.items():
            worker.others.append(self._crew.workers.send(number, "load_weights", *arguments))

    def settle(self) -> None:
        """Wait until every worker has the weights that it was told of; raises what one raised."""
        told = [flight.refs[-1] for worker in self._workers.values() for flight in worker.others]
        if told:
            ray.wait(told, num_returns=len(told), timeout=self._timeout)
        self.pump()

    def take(self, step: int, doing: str) -> tuple[Rollouts, RewardTable]:
        """The oldest groups that are done, for one step; waits for them. What is late by then begins again."""
        if self._constants.late == "drop":
            self._oldest = step - self._max_staleness
            self._drop_late()
        wanted, self._heard = self._prompts.per_step, time.monotonic()
        while len(self._ready) < wanted:
            self.pump(0.05)
            # Whoever hangs is replaced at its own deadline, which begins anew what is waited for here.
            if time.monotonic() > self._heard + 2 * self._timeout:
                raise ActorLost(
                    f"Nothing was heard of rollouts within {2 * self._timeout:.0f} s in {doing} (run.timeout_seconds)."
                )
        self._ready.sort(key=lambda group: group.position)
        taken, self._ready = self._ready[:wanted], self._ready[wanted:]
        rollouts = self._rollouts(taken, step)
        self._crew.check_environments(rollouts, self._sampling.n, doing)
        table = self._crew.judged([group.table for group in taken if group.table is not None])
        self.pump()
        return rollouts, table

    # Work

    def pump(self, seconds: float = 0.0) -> None:
        """Hand out what there is room for; take what has come back, waiting for something at most `seconds`."""
        # So many that what is begun now, by the weights of this step, is trained in time where all goes in order.
        room = self._prompts.per_step * self._max_staleness
        while len(self._all()) < room and self._next < self._end:
            self._waiting.append(self._group_at(self._next))
            self._next += 1
        self._mind_workers()
        for number, worker in self._workers.items():
            while len(worker.calls) < CALLS_QUEUED and worker.num_groups:
                worker.calls.append(self._advance(number, worker))
        self._judge()
        flights = self._flights()
        if not flights:
            time.sleep(seconds)  # for a worker to come
            return
        ready, _ = ray.wait(list(flights), num_returns=1, timeout=seconds)
        ready, _ = ray.wait(list(flights), num_returns=len(flights), timeout=0)
        now = time.monotonic()
        for ref, (flight, land) in flights.items():
            if ref in ready or now > flight.deadline:
                land(flight)

    def _flights(self) -> dict[ObjectRef, tuple[Flight, Callable[[Flight], None]]]:
        """What is under way, and who takes it when it lands."""
        found: dict[ObjectRef, tuple[Flight, Callable[[Flight], None]]] = {}
        for worker in self._workers.values():
            for flight in worker.calls:
                found[flight.refs[-1]] = flight, self._land_group
            for flight in worker.others:
                found[flight.refs[-1]] = flight, self._land_other
        for flight, _ in self._scoring.values():
            found[flight.refs[-1]] = flight, self._land_tables
        return found

    def _group_at(self, position: int) -> _Group:
        return _Group(position, self._prompts.at([position], self._anchors))

    def _mind_workers(self) -> None:
        """Workers come and go: what one had begun that is gone, others begin again. Each group that waits goes to the
        one that has least to do."""
        self._crew.workers.admit()
        ready = self._crew.workers.ready
        for number, worker in list(self._workers.items()):
            if ready.get(number) is not worker.actor:
                self._waiting += [*worker.begun.values(), *worker.to_begin]
                del self._workers[number]
        for number in ready.keys() - self._workers.keys():
            self._workers[number] = _Worker(ready[number])
            self._heard = time.monotonic()
        if self._workers:
            for group in sorted(self._waiting, key=lambda group: group.position):
                min(self._workers.values(), key=lambda worker: worker.num_groups).to_begin.append(group)
            self._waiting = []

    def _advance(self, number: int, worker: _Worker) -> Flight:
        groups, worker.to_begin = worker.to_begin, []
        for group in groups:
            self._number += 1
            group.number, group.version = self._number, self._version
            worker.begun[group.number] = group
        numbers = tuple(group.number for group in groups)
        batch = PromptBatch.concat([group.prompt for group in groups])
        prompts = batch.prompts if self._with_prompts else ()
        return self._crew.workers.send(
            number, "advance", numbers, batch.shard, self._sampling, prompts, self._constants.seconds
        )

    def _land_group(self, flight: Flight) -> None:
        worker = self._workers[flight.number]
        worker.calls.remove(flight)
        landed = self._crew.workers.landed(flight, "generating rollouts ahead")
        if landed is LOST_CALL:
            self._heard = time.monotonic()
            return
        batch, report = landed
        group = worker.begun.pop(report.number, None) if report.number is not None else None
        if group is not None:
            self._heard = time.monotonic()
            group.batch, group.report = batch, report
            self._unjudged.append(group)

    def _land_other(self, flight: Flight) -> None:
        self._workers[flight.number].others.remove(flight)
        self._crew.workers.landed(flight, "loading weights")

    def _judge(self) -> None:
        """Give judges that are idle what is not judged: together, since a judge may take as long for many as for
        one."""
        self._crew.judges.admit()
        idle = [number for number in self._crew.judges.ready if number not in self._scoring]
        if not idle or not self._unjudged:
            return
        groups, self._unjudged = self._unjudged, []
        prompts = [group.prompt.prompts for group in groups]
        flight = self._crew.judges.send(idle[0], "score_each", prompts, *(group.batch for group in groups))
        self._scoring[idle[0]] = flight, groups

    def _land_tables(self, flight: Flight) -> None:
        _, groups = self._scoring.pop(flight.number)
        self._heard = time.monotonic()
        try:
            tables = self._crew.judges.landed(flight, "judging rollouts that ran ahead")
        except DataLost:  # with the node that they were made on: they cost their own time, and not the run's
            self._waiting += [self._group_at(group.position) for group in groups]
            return
        if tables is LOST_CALL:
            self._unjudged += groups
            return
        for group, table in zip(groups, tables, strict=True):
            group.table = table
        self._ready += self._in_time(groups)

    # Staleness

    def _drop_late(self) -> None:
        """Begin groups again that too old weights began; those that judges have follow when they come back."""
        for number, worker in self._workers.items():
            late = [group for group in worker.begun.values() if group.version < self._oldest]
            if late:
                worker.others.append(self._crew.workers.send(number, "drop", tuple(group.number for group in late)))
            for group in late:
                del worker.begun[group.number]
                self._begin_again(group)
        self._unjudged = self._in_time(self._unjudged)
        self._ready = self._in_time(self._ready)

    def _in_time(self, groups: Sequence[_Group]) -> list[_Group]:
        for group in groups:
            if group.version < self._oldest:
                self._begin_again(group)
        return [group for group in groups if group.version >= self._oldest]

    def _begin_again(self, group: _Group) -> None:
        self._num_late += 1
        self._waiting.append(self._group_at(group.position))

    def _all(self) -> list[_Group]:
        """Groups that are not trained yet."""
        at_workers = [g for worker in self._workers.values() for g in (*worker.to_begin, *worker.begun.values())]
        at_judges = [group for _, groups in self._scoring.values() for group in groups]
        return [*self._waiting, *at_workers, *self._unjudged, *at_judges, *self._ready]

    def _rollouts(self, groups: Sequence[_Group], step: int) -> Rollouts:
        reports = [group.report for group in groups if group.report is not None]
        stale = [step - v for report in reports for v in report.versions if v != CACHED_VERSION]
        counts = Counter(stale)
        late, self._num_late = self._num_late, 0
        metrics = {
            "ahead/staleness_mean": sum(stale) / max(len(stale), 1),
            "ahead/staleness_max": max(stale, default=0),
            "ahead/late_groups": late,
            **{f"ahead/staleness_{versions}": count for versions, count in sorted(counts.items())},
        }
        return Rollouts(
            tuple(group.prompt for group in groups),
            tuple(group.batch for group in groups if group.batch is not None),
            tuple(GenerationReport(r.num_tokens, 0.0, None, r.failures) for r in reports),
            metrics,
        )
