"""An episode of the `verifiers` library, its control flow turned inside out.

The library runs an episode by itself and asks a client for the model's turns. Here that runs as a task of asyncio, and
the client is the environment that the model's turns are handed to: what the library asks with is what the turn before
is answered with. Imported only where the library is installed.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import verifiers.v1 as vf
from verifiers.v1.dialects import Dialect
from verifiers.v1.graph import PendingTurn

from thornback.contracts import EnvironmentFailed, Observation, Prompt
from thornback.data.tool_calls import parse_tool_calls

TOTAL = "reward"  # the library's own word for the sum of its rewards
_LINGER_SECONDS = 60.0  # what episodes share outlives the last one by this, so that the next batch finds it running


def plain(message: vf.Message) -> dict[str, str]:
    """A message as chat templates take it. Raises `ValueError` for more than text."""
    content = message.content or ""
    if not isinstance(content, str):
        if any(part.type != "text" for part in content):
            raise ValueError("It shows images, but thornback trains on text.")
        content = "\n".join(part.text for part in content)
    if getattr(message, "tool_calls", None):
        raise ValueError("It shows calls of tools that the model has not made.")
    extra = {name: value for name in ("name", "tool_call_id") if (value := getattr(message, name, None))}
    return {"role": message.role, "content": content, **extra}


class Serving:
    """The library's environment, with the servers that its episodes share. Each event loop has one of its own."""

    def __init__(self, config: vf.EnvConfig) -> None:
        self._config = config
        self._num_episodes = 0
        self._ended = asyncio.Event()
        self._env: asyncio.Future[vf.Env] | None = None
        self._tasks: set[asyncio.Task] = set()

    @asynccontextmanager
    async def env(self) -> AsyncIterator[vf.Env]:
        """For one episode. It starts with the first that comes, and stops some time after the last has gone."""
        self._num_episodes += 1
        if self._env is None:
            self._env = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(self._serve(self._env))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            yield await asyncio.shield(self._env)
        finally:
            self._num_episodes -= 1
            self._ended.set()

    async def _serve(self, ready: asyncio.Future[vf.Env]) -> None:
        try:
            env = vf.load_environment(self._config)
            async with env.serving():
                ready.set_result(env)
                while self._num_episodes:
                    self._ended.clear()
                    await self._ended.wait()
                    if not self._num_episodes:
                        await asyncio.sleep(_LINGER_SECONDS)
                self._env = None  # who comes now starts anew, while this one stops
        except Exception as error:
            if ready.done():
                raise
            self._env = None
            ready.set_exception(error)


class _Reply(NamedTuple):
    """A turn of the model's, for the library."""

    content: str
    calls: tuple[tuple[str, str], ...] = ()  # names and arguments
    finish_reason: str = "stop"


class VerifiersEnvironment(vf.Client):
    """The other side of one episode: to the player an environment, to the library the model.

    `serving` is called in the event loop that the episode runs in.
    """

    def __init__(self, task: vf.Task, prompt: Prompt, serving: Callable[[], Serving]) -> None:
        self._task = task
        self._prompt = prompt
        self._serving = serving
        self._asked: asyncio.Queue[tuple[dict[str, str], ...] | None] = asyncio.Queue()  # None: the episode is over
        self._replies: asyncio.Queue[_Reply | None] = asyncio.Queue()  # None: the model cannot go on
        self._playing: asyncio.Task[vf.Episode] | None = None
        self._last: PendingTurn | None = None
        self._dropped = False

    # To the player

    async def step(self, turn: str) -> Observation:
        await self._begin()
        content, calls = parse_tool_calls(turn) if self._prompt.tools else (turn, [])
        self._replies.put_nowait(_Reply(content, tuple(calls), "tool_calls" if calls else "stop"))
        messages = await self._asked.get()
        if messages is not None:
            return Observation(messages, len(calls))
        return Observation(num_calls=len(calls), judged=self._judged())

    async def truncate(self, turn: str | None) -> Observation:
        """As the library does it: an unfinished turn is the last one, and whoever asks for another is refused."""
        await self._begin()
        self._replies.put_nowait(None if turn is None else _Reply(turn, (), "length"))
        while await self._asked.get() is not None:
            self._replies.put_nowait(None)
        return Observation(judged=self._judged())

    def drop(self) -> None:
        self._dropped = True
        if self._playing is not None:
            self._playing.get_loop().call_soon_threadsafe(self._playing.cancel)

    async def _begin(self) -> None:
        """Start the library's side, at the model's first turn, and hear what it begins with."""
        if self._playing is not None:
            return
        self._playing = asyncio.create_task(self._play())
        self._playing.add_done_callback(lambda _: self._asked.put_nowait(None))
        if self._dropped:  # by another thread, before there was a task to cancel
            self._playing.cancel()
        if await self._asked.get() is None:
            self._judged()
            raise EnvironmentFailed("The environment ended before it asked the model anything.")

    def _judged(self) -> dict[str, float]:
        """Of an episode that is over. Raises `EnvironmentFailed` with the library's own cause where it failed."""
        assert self._playing is not None
        episode = self._playing.result()
        if not episode.ok:
            errors = [*(error for trace in episode.traces for error in trace.errors), *episode.errors]
            raise EnvironmentFailed(f"{errors[-1].type}: {errors[-1].message}" if errors else "It did not end well.")
        (trace,) = episode.traces
        if missing := [name for name, reward in trace.rewards.items() if reward is None]:
            raise EnvironmentFailed(f"The environment did not come to judge {', '.join(missing)}.")
        scores = {name: reward.score for name, reward in trace.rewards.items()}
        metrics = {name: value for name, value in trace.metrics.items() if value is not None}
        return {**metrics, **scores, TOTAL: trace.reward}

    # To the library

    async def _play(self) -> vf.Episode:
        # A server of the library's keeps a client for each configuration of one: this names ours.
        config = vf.EvalClientConfig(base_url="http://policy.invalid", api_key_var="", headers={"id": uuid.uuid4().hex})
        async with self._serving().env() as env:
            clients = env._interception.clients
            clients[config.model_dump_json()] = self
            try:
                return await env.run_episode(self._task, vf.ModelContext("policy", config))
            finally:
                del clients[config.model_dump_json()]

    async def get_response(
        self,
        dialect: Dialect,
        body: dict,
        sampling: vf.SamplingConfig,
        session_id: str | None = None,
        turn: PendingTurn | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> vf.Response:
        """The model's next turn, once the player has it."""
        assert turn is not None
        try:
            self._asked.put_nowait(self._news(turn, body.get("tools") or []))
        except ValueError as error:
            raise vf.ProviderError(str(error), status_code=400) from error
        self._last = turn
        reply = await self._replies.get()
        if reply is None:
            turn.trace.stop("max_total_tokens")
            raise vf.ProviderError("The model can write no more.", status_code=400)
        raw = _completion(reply, number=len(turn.prompt))
        response = dialect.parse_response(dialect.validate_response(raw))
        response.raw = raw
        return response

    def _news(self, turn: PendingTurn, tools: list[dict]) -> tuple[dict[str, str], ...]:
        """What is said to the model that it has not seen. Raises `ValueError` where that is not all that differs."""
        messages = tuple(plain(message) for message in turn.tail)
        if self._last is None:
            if messages != self._prompt.messages or tuple(tools) != self._prompt.tools:
                raise ValueError("The environment begins with other messages or tools than its task has.")
            return messages
        if turn.trace is not self._last.trace:
            raise ValueError("The environment runs its agent more than once in an episode.")
        if turn.tail_start != len(self._last.prompt) + 1:
            raise ValueError("The environment changes what was said before, which the model cannot unsay.")
        return messages


def _completion(reply: _Reply, number: int) -> dict[str, Any]:
    """A turn in OpenAI's format. `number` tells the calls of one turn from those of another."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.calls:
        message["tool_calls"] = [
            {"id": f"call_{number}_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(reply.calls)
        ]
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    return {"id": "policy", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}
