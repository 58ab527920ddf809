"""Groups of rollouts on one engine, step by step: those of a prompt begin together, and the group is done when the last
of them is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from thornback.contracts import Engine, Prompt, Request, SamplingParams, Trajectory
from thornback.engine import Collector, Sample


@dataclass(frozen=True, slots=True)
class Start:
    """A group's beginning: its prompt (None where nobody takes turns with the model), how many rollouts of it, and the
    seed of the first; the next has seed + 1."""

    prompt: Prompt | None
    token_ids: tuple[int, ...]
    seed: int
    count: int


@dataclass(slots=True)
class Group:
    """Rollouts of one prompt; those that are not done are None. `failures`: environments that failed, by cause."""

    name: str
    start: Start
    sampling: SamplingParams
    rollouts: list[Trajectory | None]
    failures: Counter[str] = field(default_factory=Counter)
    num_done: int = 0

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those of a group that is done."""
        return [rollout for rollout in self.rollouts if rollout is not None]


class GroupPlayer:
    """Plays groups on one engine. A rollout is one answer of the model here."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._groups: dict[str, Group] = {}
        self._asking: dict[tuple[str, int], tuple[Group, int]] = {}  # by request and sample
        self._done: list[Group] = []
        self._collector = Collector()

    def __len__(self) -> int:
        """Groups that were begun and not handed out."""
        return len(self._groups)

    def begin(self, name: str, start: Start, sampling: SamplingParams) -> None:
        """Begin a group under a name that no other has; raises `InvalidRequest`."""
        group = self._groups[name] = Group(name, start, sampling, [None] * start.count)
        if not start.count:
            self._done.append(group)
            return
        first = replace(sampling, seed=start.seed, n=start.count)
        self.engine.add_request(Request(name, start.token_ids, first))
        self._asking |= {(name, index): (group, index) for index in range(start.count)}

    def step(self, patience: float | None = None) -> None:
        """One pass of the engine, and what follows from it. Where all is in others' hands, waits for them, `patience`
        seconds at most."""
        if self.engine.has_unfinished_requests():
            self._collector.take(self.engine.step())
        for key, sample in self._collector.drain():
            group, index = self._asking.pop(key)
            self._take_turn(group, index, sample)

    def finished(self) -> list[Group]:
        """The groups that are done, in the order in which they came to it; each is handed out once."""
        done, self._done = self._done, []
        for group in done:
            del self._groups[group.name]
        return done

    def take(self, names: Iterable[str]) -> list[Group]:
        """Play until these groups are done; they are handed out here, others later. After an error they are gone."""
        wanted = list(names)
        try:
            while not all(map(self._is_done, wanted)):
                self.step()
        except BaseException:
            self.drop(wanted)
            raise
        taken = [self._groups.pop(name) for name in wanted]
        self._done = [group for group in self._done if group.name in self._groups]
        return taken

    def _is_done(self, name: str) -> bool:
        group = self._groups[name]
        return group.num_done == len(group.rollouts)

    def drop(self, names: Iterable[str]) -> None:
        """Give groups up, wherever they stand; unknown names are ignored."""
        gone = {name for name in names if self._groups.pop(name, None) is not None}
        for request_id, index in [key for key, (group, _) in self._asking.items() if group.name in gone]:
            del self._asking[request_id, index]
            self.engine.abort_request(request_id)
            self._collector.forget(request_id)
        self._done = [group for group in self._done if group.name not in gone]

    def _take_turn(self, group: Group, index: int, sample: Sample) -> None:
        mask = np.ones(len(sample.token_ids), np.uint8)
        self._end(
            group,
            index,
            Trajectory(sample.token_ids, sample.logprobs, sample.versions, mask, sample.finish_reason),
        )

    def _end(self, group: Group, index: int, rollout: Trajectory) -> None:
        if self._groups.get(group.name) is not group:
            return  # it was given up
        group.rollouts[index] = rollout
        group.num_done += 1
        if group.num_done == len(group.rollouts):
            self._done.append(group)
