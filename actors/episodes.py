"""Plays episodes: the model's turns on an engine, its environment's between them, many episodes at once."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from thornback.actors.specs import EpisodeSpec
from thornback.contracts import (
    ClosableEnvironment,
    Engine,
    Environment,
    EnvironmentFailed,
    Observation,
    Prompt,
    Request,
    SamplingParams,
    Trajectory,
)
from thornback.data import render_reply
from thornback.engine import Collector, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GRACE_SECONDS = 30.0  # for a coroutine's own deadline to act, before its thread counts as blocked


@dataclass(frozen=True, slots=True)
class Start:
    """An episode's beginning: its prompt, how many episodes of it, and the seed of the first; the next has seed + 1."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    seed: int
    count: int


@dataclass(slots=True)
class _Episode:
    """What has been said so far. `number`: of its start; `index` among that one's."""

    start: Start
    number: int
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


class EpisodePlayer:
    """Plays on one engine with one tokenizer.

    What was sampled is what is kept: turns are never encoded again. An episode ends when its environment says nothing
    more ("stop"), when the model runs out of tokens or of turns ("length"; an environment that can judges what there
    is), or when its environment fails ("abort").
    """

    def __init__(self, engine: Engine, spec: EpisodeSpec, tokenizer: PreTrainedTokenizerBase) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.task = spec.make_task()
        self.max_turns = spec.max_turns or self.task.max_turns
        self.failures: Counter[str] = Counter()
        self._waiting = _Waiting(spec.timeout)
        self._asking: dict[tuple[str, int], _Episode] = {}  # by request and sample

    def play(self, starts: Sequence[Start], sampling: SamplingParams) -> list[list[Trajectory]]:
        """The episodes of each start. `failures` counts, by cause, those of this call whose environment failed."""
        self.failures = Counter()
        groups = [
            [
                _Episode(start, number, i, self.task.environment(start.prompt, start.seed + i))
                for i in range(start.count)
            ]
            for number, start in enumerate(starts)
        ]
        for number, (start, group) in enumerate(zip(starts, groups, strict=True)):
            if group:
                first = replace(sampling, seed=start.seed, n=start.count)
                self.engine.add_request(Request(str(number), start.token_ids, first))
            self._asking |= {(str(number), episode.index): episode for episode in group}
        try:
            self._play_to_the_end(sampling)
        except BaseException:
            for episode in (episode for group in groups for episode in group):
                _drop(episode)
            raise
        return [[episode.trajectory() for episode in group] for group in groups]

    def _play_to_the_end(self, sampling: SamplingParams) -> None:
        collector = Collector()
        while self._asking or len(self._waiting):
            if self.engine.has_unfinished_requests():
                collector.take(self.engine.step())
            for key, sample in collector.drain():
                episode = self._asking.pop(key)
                self._take_turn(episode, sample)
            for episode, observed in self._waiting.done(block=not self._asking):
                self._take_reply(episode, observed, sampling)

    def _take_turn(self, episode: _Episode, sample: Sample) -> None:
        """The model has ended its turn: hand it to the environment."""
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

    def _tell(self, episode: _Episode, method: Callable[[Any], object], turn: str | None) -> None:
        observed: object
        try:
            observed = method(turn)
        except Exception as error:  # a user's environment may fail in any way
            observed = error
        self._waiting.add(episode, observed)

    def _take_reply(self, episode: _Episode, observed: object, sampling: SamplingParams) -> None:
        """The environment has answered: ask the model for its next turn, unless the episode is over."""
        if not isinstance(observed, Observation):
            failed = isinstance(observed, BaseException)
            said = f"{type(observed).__name__}: {observed}" if failed else f"returned {observed!r}, no Observation"
            self.failures[said[:200]] += 1
            episode.finish_reason = "abort"
            _drop(episode)
            return
        episode.num_calls += observed.num_calls
        episode.judged |= observed.judged
        if episode.finish_reason:
            return
        if not observed.messages:
            episode.finish_reason = "stop"
            return
        room = min(sampling.max_tokens, self.engine.max_model_len - len(episode.start.token_ids))
        reply = render_reply(self.tokenizer, observed.messages) if episode.num_turns < self.max_turns else None
        if reply is None or len(episode.token_ids) + len(reply) >= room:
            self._truncate(episode, None)
            return
        episode.extend(reply, [0.0] * len(reply), [episode.versions[-1]] * len(reply), 0)
        request_id = f"{episode.number}/{episode.index}/{episode.num_turns}"
        # Draws go on by their position, as if nobody had interrupted.
        going_on = replace(sampling, seed=episode.start.seed + episode.index, n=1)
        request = Request(request_id, episode.start.token_ids, going_on, output_token_ids=tuple(episode.token_ids))
        self.engine.add_request(request)
        self._asking[request_id, 0] = episode


def _drop(episode: _Episode) -> None:
    if isinstance(episode.environment, ClosableEnvironment):
        episode.environment.drop()


class _Waiting:
    """Environments that were asked. What is awaited runs in a thread of its own, which starts when it is needed."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: queue.SimpleQueue[tuple[_Episode, object]] = queue.SimpleQueue()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, episode: _Episode, observed: object) -> None:
        self._count += 1
        if not inspect.isawaitable(observed):
            self._answers.put((episode, observed))
            return
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="environments", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._await(episode, observed), self._loop)

    def done(self, block: bool) -> list[tuple[_Episode, object]]:
        """Answers that are there, in the order in which they came; with `block`, one at least if any is awaited."""
        found = []
        if block and self._count:
            try:
                found.append(self._answers.get(timeout=self._timeout + _GRACE_SECONDS))
            except queue.Empty:
                raise EnvironmentFailed(
                    f"{self._count} environments have blocked their thread for {self._timeout + _GRACE_SECONDS:.0f} s; "
                    "await what takes long, for example by asyncio.to_thread."
                ) from None
        while not self._answers.empty():
            found.append(self._answers.get())
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
