"""Plays episodes: the model's turns on an engine, its environment's between them, many episodes at once."""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from thornback.actors.groups import Group, GroupPlayer, Start
from thornback.actors.specs import EpisodeSpec
from thornback.contracts import (
    ClosableEnvironment,
    Engine,
    Environment,
    EnvironmentFailed,
    Observation,
    Request,
    SamplingParams,
    Trajectory,
)
from thornback.data import render_reply
from thornback.engine import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GRACE_SECONDS = 30.0  # for a coroutine's own deadline to act, before its thread counts as blocked


@dataclass(slots=True)
class _Episode:
    """What has been said so far in rollout `index` of a group."""

    group: Group
    index: int
    environment: Environment
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    num_turns: int = 0
    num_calls: int = 0
    judged: dict[str, float] = field(default_factory=dict)
    finish_reason: str = ""

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int], mask: int) -> None:
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += versions
        self.loss_mask += [mask] * len(token_ids)

    def trajectory(self) -> Trajectory:
        return Trajectory(
            np.asarray(self.token_ids, np.int32),
            np.asarray(self.logprobs, np.float32),
            np.asarray(self.versions, np.int32),
            np.asarray(self.loss_mask, np.uint8),
            self.finish_reason,
            self.num_calls,
            self.judged,
        )


class EpisodePlayer(GroupPlayer):
    """Plays with a task's environments.

    What was sampled is what is kept: turns are never encoded again. An episode ends when its environment says nothing
    more ("stop"), when the model runs out of tokens or of turns ("length"; an environment that can judges what there
    is), or when its environment fails ("abort").
    """

    def __init__(self, engine: Engine, spec: EpisodeSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(engine)
        self.tokenizer = tokenizer
        self.task = spec.make_task()
        self.max_turns = spec.max_turns or self.task.max_turns
        self._waiting = _Waiting(spec.timeout)
        self._episodes: dict[tuple[str, int], _Episode] = {}  # by group and index

    def begin(self, name: str, start: Start, sampling: SamplingParams) -> None:
        assert start.prompt is not None
        environments = [self.task.environment(start.prompt, start.seed + i) for i in range(start.count)]
        try:
            super().begin(name, start, sampling)
        except BaseException:
            for environment in environments:
                _drop(environment)
            raise
        group = self._groups[name]
        self._episodes |= {(name, i): _Episode(group, i, environment) for i, environment in enumerate(environments)}

    def step(self, patience: float | None = None) -> None:
        super().step()
        wait = None if self._asking else math.inf if patience is None else patience
        for episode, observed in self._waiting.done(wait):
            self._take_reply(episode, observed)

    def drop(self, names: Iterable[str]) -> None:
        gone = set(names)
        super().drop(gone)
        for key in [key for key in self._episodes if key[0] in gone]:
            _drop(self._episodes.pop(key).environment)

    def _take_turn(self, group: Group, index: int, sample: Sample) -> None:
        """The model has ended its turn: hand it to the environment."""
        episode = self._episodes[group.name, index]
        tokens = sample.token_ids.tolist()
        episode.extend(tokens, sample.logprobs.tolist(), sample.versions.tolist(), 1)
        episode.num_turns += 1
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if sample.finish_reason == "stop":
            self._tell(episode, episode.environment.step, text)
        else:
            self._truncate(episode, text, sample.finish_reason)

    def _truncate(self, episode: _Episode, turn: str | None, finish_reason: str = "length") -> None:
        """The model cannot go on: let the environment judge what there is, if it can."""
        episode.finish_reason = finish_reason
        if isinstance(episode.environment, ClosableEnvironment):
            self._tell(episode, episode.environment.truncate, turn)
        else:
            self._conclude(episode)

    def _tell(self, episode: _Episode, method: Callable[[Any], object], turn: str | None) -> None:
        observed: object
        try:
            observed = method(turn)
        except Exception as error:  # a user's environment may fail in any way
            observed = error
        self._waiting.add(episode, observed)

    def _take_reply(self, episode: _Episode, observed: object) -> None:
        """The environment has answered: ask the model for its next turn, unless the episode is over."""
        group = episode.group
        if self._episodes.get((group.name, episode.index)) is not episode:
            return  # it was given up
        if not isinstance(observed, Observation):
            failed = isinstance(observed, BaseException)
            said = f"{type(observed).__name__}: {observed}" if failed else f"returned {observed!r}, no Observation"
            group.failures[said[:200]] += 1
            episode.finish_reason = "abort"
            _drop(episode.environment)
            self._conclude(episode)
            return
        episode.num_calls += observed.num_calls
        episode.judged |= observed.judged
        if not episode.finish_reason and not observed.messages:
            episode.finish_reason = "stop"
        if episode.finish_reason:
            self._conclude(episode)
            return
        room = min(group.sampling.max_tokens, self.engine.max_model_len - len(group.start.token_ids))
        reply = render_reply(self.tokenizer, observed.messages) if episode.num_turns < self.max_turns else None
        if reply is None or len(episode.token_ids) + len(reply) >= room:
            self._truncate(episode, None)
            return
        episode.extend(reply, [0.0] * len(reply), [episode.versions[-1]] * len(reply), 0)
        request_id = f"{group.name}/{episode.index}/{episode.num_turns}"
        # Draws go on by their position, as if nobody had interrupted.
        going_on = replace(group.sampling, seed=group.start.seed + episode.index, n=1)
        request = Request(request_id, group.start.token_ids, going_on, output_token_ids=tuple(episode.token_ids))
        self.engine.add_request(request)
        self._asking[request_id, 0] = (group, episode.index)

    def _conclude(self, episode: _Episode) -> None:
        del self._episodes[episode.group.name, episode.index]
        self._end(episode.group, episode.index, episode.trajectory())


def _drop(environment: Environment) -> None:
    if isinstance(environment, ClosableEnvironment):
        environment.drop()


class _Waiting:
    """Environments that were asked. What is awaited runs in a thread of its own, which starts when it is needed."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: queue.SimpleQueue[tuple[_Episode, object]] = queue.SimpleQueue()
        self._count = 0
        self._heard = 0.0  # when an answer came last, or was first waited for

    def __len__(self) -> int:
        return self._count

    def add(self, episode: _Episode, observed: object) -> None:
        if not self._count:
            self._heard = time.monotonic()
        self._count += 1
        if not inspect.isawaitable(observed):
            self._answers.put((episode, observed))
            return
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="environments", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._await(episode, observed), self._loop)

    def done(self, wait: float | None) -> list[tuple[_Episode, object]]:
        """Answers that are there, in the order in which they came; with `wait`, one at least if any is awaited and
        comes within so many seconds. Raises `EnvironmentFailed` where none has come for too long."""
        found = []
        if wait is not None and self._count:
            left = max(0.0, self._heard + self._timeout + _GRACE_SECONDS - time.monotonic())
            try:
                found.append(self._answers.get(timeout=min(wait, left)))
            except queue.Empty:
                if wait < left:
                    return []
                raise EnvironmentFailed(
                    f"{self._count} environments have blocked their thread for {self._timeout + _GRACE_SECONDS:.0f} s; "
                    "await what takes long, for example by asyncio.to_thread."
                ) from None
        while not self._answers.empty():
            found.append(self._answers.get())
        if found:
            self._heard = time.monotonic()
        self._count -= len(found)
        return found

    async def _await(self, episode: _Episode, observed: Awaitable[Observation]) -> None:
        try:
            answer: object = await asyncio.wait_for(observed, self._timeout)
        except TimeoutError:
            answer = TimeoutError(f"no answer within {self._timeout:g} s")
        except BaseException as error:
            answer = error
        self._answers.put((episode, answer))
