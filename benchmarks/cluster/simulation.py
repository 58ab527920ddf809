"""Replicas that compute prompts in chunks beside what they decode, step by step, and requests that go through them."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.cluster.traces import Arrival
from thornback.algorithms import Node, Placement

BUDGET = 2048  # tokens of a step
SAMPLES = 256  # that a replica decodes at once
STRIDE = 8  # steps that only decode are taken together, at most so many


class Policy(Protocol):
    """Says where requests go; the product's own `Placer`, or one that others use."""

    def place(self, now: float, num_tokens: int) -> Placement | None: ...

    def prefilled(self, placed: Placement) -> None: ...

    def begun(self, placed: Placement, now: float) -> None: ...

    def said(self, placed: Placement, num_tokens: int) -> None: ...

    def finished(self, placed: Placement, num_outputs: int) -> None: ...


@dataclass(slots=True)
class Job:
    """A request on its way. Times in seconds from the trace's beginning; NaN: not yet, or never."""

    arrival: Arrival
    placed: Placement | None = None
    left: int = 0  # prompt tokens that are to be computed
    said: int = 0
    first_token: float = float("nan")
    end: float = float("nan")

    @property
    def time_per_token(self) -> float:
        return (self.end - self.first_token) / max(self.arrival.num_outputs - 1, 1)


@dataclass(slots=True)
class Replica:
    """One engine: first come, first served; what decodes before what is prefilled."""

    node: Node
    prompts: deque[Job] = field(default_factory=deque)
    waiting: deque[Job] = field(default_factory=deque)  # for room to decode
    decoding: list[Job] = field(default_factory=list)
    context: int = 0  # tokens of what decodes
    busy: bool = False

    def admit(self) -> None:
        while self.waiting and len(self.decoding) < SAMPLES:
            job = self.waiting[0]
            size = job.arrival.num_tokens + job.arrival.num_outputs
            if self.decoding and self.context + size > self.node.capacity:
                break
            self.decoding.append(self.waiting.popleft())
            self.context += job.arrival.num_tokens + job.said

    def step(self, soonest: float) -> tuple[float, list[tuple[Job, int]], int]:
        """The next step's seconds, the chunks of prompts in it, and how many steps of the same kind it stands for: more
        than one only where nothing is prefilled, and none ends within them or after `soonest` seconds."""
        budget, chunks = BUDGET - len(self.decoding), []
        for job in self.prompts:
            if budget <= 0:
                break
            chunks.append((job, min(job.left, budget)))
            budget -= chunks[-1][1]
        node, decodes = self.node, len(self.decoding)
        seconds = sum(n for _, n in chunks) / node.prefill_rate
        if decodes or not chunks:
            seconds += node.step_seconds + decodes * node.sample_seconds + self.context * node.context_seconds
        steps = 1
        if decodes and not chunks:
            fewest = min(job.arrival.num_outputs - job.said for job in self.decoding)
            steps = int(max(1, min(STRIDE, fewest, soonest / seconds)))
        return seconds * steps, chunks, steps


def simulate(
    trace: Sequence[Arrival], nodes: Sequence[Node], policy: Policy, transfer_seconds: float, transfer_rate: float
) -> list[Job]:
    """All requests of a trace, to their end."""
    replicas = {node.node_id: Replica(node) for node in nodes}
    numbers = itertools.count()
    events: list[tuple[float, int, str, Any]] = []  # (time, number, what, of what)
    jobs = [Job(arrival) for arrival in trace]
    for job in jobs:
        heapq.heappush(events, (job.arrival.time, next(numbers), "arrival", job))

    def start(now: float, replica: Replica) -> None:
        replica.admit()
        if replica.busy or not (replica.prompts or replica.decoding):
            return
        replica.busy = True
        soonest = max(0.0, events[0][0] - now) if events else float("inf")
        seconds, chunks, steps = replica.step(soonest)
        heapq.heappush(events, (now + seconds, next(numbers), "step", (replica, chunks, list(replica.decoding), steps)))

    while events:
        now, _, what, of = heapq.heappop(events)
        if what == "arrival":
            of.placed = policy.place(now, of.arrival.num_tokens)
            if of.placed is not None:  # else it was refused
                of.left = of.arrival.num_tokens - of.placed.num_hit
                replicas[of.placed.prefill].prompts.append(of)
                start(now, replicas[of.placed.prefill])
        elif what == "handed over":
            replica = replicas[of.placed.decode]
            replica.waiting.append(of)
            start(now, replica)
        else:
            replica, chunks, decoded, steps = of
            replica.busy = False
            for job in decoded:
                if job.said == 1:
                    policy.begun(job.placed, now)
                job.said += steps
                policy.said(job.placed, steps)
                replica.context += steps
                if job.said >= job.arrival.num_outputs:
                    job.end = now
                    replica.decoding.remove(job)
                    replica.context -= job.arrival.num_tokens + job.said
                    policy.finished(job.placed, job.said)
            for job, count in chunks:
                job.left -= count
                if job.left:
                    continue
                replica.prompts.remove(job)
                job.first_token, job.said = now, 1
                policy.prefilled(job.placed)
                if job.arrival.num_outputs == 1:
                    job.end = now
                    policy.finished(job.placed, 1)
                elif job.placed.split:
                    way = 0.0 if job.placed.same_machine else transfer_seconds + job.arrival.num_tokens / transfer_rate
                    heapq.heappush(events, (now + way, next(numbers), "handed over", job))
                else:
                    replica.waiting.append(job)
            start(now, replica)
    return jobs
