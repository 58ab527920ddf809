"""One engine in a thread of its own; its outputs cross to an asyncio loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from thornback.contracts import Engine, EngineLoad, KVImport, Output, Request

JOIN_TIMEOUT_S = 30.0
IDLE_S = 5.0
NEW = 0.1  # what a step weighs beside those before it
Command = Callable[[], None]


class EngineFailed(RuntimeError):
    """The engine raised in a step; its replica is of no more use."""


class Customer(Protocol):
    """Who is told of an engine's work, on the asyncio loop."""

    def deliver(self, outputs: list[Output]) -> None:
        """What one step has produced."""

    def reject(self, request_id: str, error: Exception) -> None:
        """The engine does not take a request."""

    def fail(self, error: BaseException) -> None:
        """A step has raised; nothing comes after this."""


class EngineLoop:
    """Owns an engine, which only its thread touches, and steps it while there is work.

    What a step produces crosses to the asyncio loop in one call, so the crossing costs as many wake-ups as there
    are steps, however many requests run.
    """

    def __init__(self, make_engine: Callable[[], Engine], customer: Customer) -> None:
        self._customer = customer
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self.failure: BaseException | None = None
        self.engine: Engine | None = None
        self.load: EngineLoad | None = None  # as of the last step, for whoever cannot wait for the next one
        self.step_seconds = 0.0  # between two tokens of a sample, of late, while no prompts are computed
        self._ready: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_engine,), name="engine", daemon=True)
        self._thread.start()

    async def ready(self) -> Engine:
        """Wait for the engine to be built; raises what its constructor raised."""
        return await asyncio.wrap_future(self._ready)

    def add(self, request: Request, kv: KVImport | None = None) -> None:
        """Begin a request, with the keys and values that came with it. Raises `EngineFailed`."""
        self._submit(lambda: self._add(request, kv))

    def abort(self, request_id: str) -> None:
        """End a request, if it has not ended."""
        self.submit(lambda engine: engine.abort_request(request_id))

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run `function(engine)` between two steps, in the engine's thread. Raises `EngineFailed`."""
        result: Future[Any] = Future()

        def command() -> None:
            if not result.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                assert self.engine is not None
                result.set_result(function(self.engine))
            except BaseException as error:
                result.set_exception(error)

        self._submit(command)
        return await asyncio.wrap_future(result)

    def submit(self, function: Callable[[Engine], Any]) -> None:
        """The same, without waiting for it; nothing is done if the engine has failed."""
        if self.failure is None:
            self._submit(lambda: function(self.engine))  # type: ignore[arg-type]

    def close(self) -> None:
        """Stop after the step that runs now."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(JOIN_TIMEOUT_S)

    def _submit(self, command: Command) -> None:
        if self.failure is not None:
            raise EngineFailed(f"The engine of this replica has failed: {self.failure!r}")
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # In the engine's thread

    def _run(self, make_engine: Callable[[], Engine]) -> None:
        try:
            self.engine = make_engine()
        except BaseException as error:
            self.failure = error
            self._ready.set_exception(error)
            return
        self.load = self.engine.load()
        self._ready.set_result(self.engine)
        try:
            while self._serve_once(self.engine):
                pass
        except BaseException as error:
            self.failure = error
            self._tell(self._customer.fail, error)

    def _serve_once(self, engine: Engine) -> bool:
        """Take what was asked, then one step, now and then without work; False when it is time to end."""
        with self._wake:
            while not self._commands and not self._closing and not engine.has_unfinished_requests():
                if not self._wake.wait(IDLE_S):
                    break  # a step without work frees what dead peers held
            if self._closing:
                return False
            commands, self._commands = self._commands, deque()
        began, before = time.monotonic(), self.load.num_running if self.load is not None else 0
        for command in commands:
            command()
        outputs = engine.step()
        self.load = engine.load()
        if outputs:
            ended = sum(output.finish_reason is not None for output in outputs)
            if len(outputs) == before == self.load.num_running + ended:  # it has computed no part of a prompt
                tokens = sum(len(output.token_ids) for output in outputs)
                seconds = (time.monotonic() - began) * len(outputs) / tokens
                self.step_seconds += (seconds - self.step_seconds) * (NEW if self.step_seconds else 1.0)
        if outputs:
            self._tell(self._customer.deliver, outputs)
        elif engine.has_unfinished_requests():
            time.sleep(0.001)  # paused, or every block is leased out: nothing runs until somebody acts
        return True

    def _add(self, request: Request, kv: KVImport | None) -> None:
        assert self.engine is not None
        try:
            self.engine.add_request(request, kv)
        except Exception as error:
            self._tell(self._customer.reject, request.request_id, error)

    def _tell(self, function: Callable[..., None], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(function, *arguments)
