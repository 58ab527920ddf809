"""One engine in a thread of its own, and streams of its outputs for an asyncio loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any

from thornback.contracts import Engine, EngineLoad, Output, Request
from thornback.serve.outputs import merge_outputs

JOIN_TIMEOUT_S = 30.0
Command = Callable[[], None]


class EngineFailed(RuntimeError):
    """The engine raised in a step; its replica is of no more use."""


class OutputStream:
    """What one request has produced and nobody has read. Written and read on the asyncio loop only."""

    def __init__(self) -> None:
        self.pending: list[Output] = []
        self.open_samples = 0
        self.error: BaseException | None = None
        self.arrived = asyncio.Event()
        self.ended = asyncio.Event()


class EngineLoop:
    """Owns an engine, which only its thread touches, and steps it while there is work.

    What a step produces crosses to the asyncio loop in one call, so the crossing costs as many wake-ups as there
    are steps, however many requests run.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._loop = asyncio.get_running_loop()
        self._commands: deque[Command] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._streams: dict[str, OutputStream] = {}
        self.failure: BaseException | None = None
        self.engine: Engine | None = None
        self.load: EngineLoad | None = None  # as of the last step, for whoever cannot wait for the next one
        self._ready: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(make_engine,), name="engine", daemon=True)
        self._thread.start()

    async def ready(self) -> Engine:
        """Wait for the engine to be built; raises what its constructor raised."""
        return await asyncio.wrap_future(self._ready)

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def stream(self, request: Request, gap_per_stream_s: float | None) -> AsyncGenerator[list[Output], None]:
        """The outputs of a request, at most one for each of its samples in each item.

        The first tokens come at once; after them, items lie `gap_per_stream_s` seconds apart for every other stream
        that runs, and hold all that was produced meanwhile. None: one item, at the end. Leaving the iterator aborts
        the request. Raises what the engine raises of the request (`InvalidRequest`), and `EngineFailed`.
        """
        stream = self._streams[request.request_id] = OutputStream()
        stream.open_samples = request.sampling.n
        self._submit(lambda: self._add(request))
        try:
            while True:
                await (stream.ended if gap_per_stream_s is None else stream.arrived).wait()
                stream.arrived.clear()
                if stream.error is not None:
                    raise stream.error
                items, stream.pending = stream.pending, []
                if items:
                    yield merge_outputs(items)
                if stream.ended.is_set() and not stream.pending:
                    return
                gap_s = (gap_per_stream_s or 0.0) * (self.num_streams - 1)
                if gap_s and not stream.ended.is_set():
                    await _wait(stream.ended, gap_s)  # its end is worth an item of its own
        finally:
            self._streams.pop(request.request_id, None)
            if not stream.ended.is_set():
                self._submit(lambda: self._abort(request.request_id))

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """Run `function(engine)` between two steps, in the engine's thread."""
        result: Future[Any] = Future()

        def command() -> None:
            try:
                assert self.engine is not None
                result.set_result(function(self.engine))
            except BaseException as error:
                result.set_exception(error)

        self._submit(command)
        return await asyncio.wrap_future(result)

    def close(self) -> None:
        """Stop after the step that runs now."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(JOIN_TIMEOUT_S)

    # In the engine's thread

    def _submit(self, command: Command) -> None:
        if self.failure is not None:
            raise EngineFailed(f"The engine of this replica has failed: {self.failure!r}")
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

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
            self._loop.call_soon_threadsafe(self._fail_all, error)

    def _serve_once(self, engine: Engine) -> bool:
        """Take what was asked, then one step; False when it is time to end."""
        with self._wake:
            while not self._commands and not self._closing and not engine.has_unfinished_requests():
                self._wake.wait()
            if self._closing:
                return False
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        outputs = engine.step()
        self.load = engine.load()
        if outputs:
            self._loop.call_soon_threadsafe(self._deliver, outputs)
        elif engine.has_unfinished_requests():
            time.sleep(0.001)  # paused, or every block is leased out: nothing runs until somebody acts
        return True

    def _add(self, request: Request) -> None:
        assert self.engine is not None
        try:
            self.engine.add_request(request)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._fail, request.request_id, error)

    def _abort(self, request_id: str) -> None:
        assert self.engine is not None
        self.engine.abort_request(request_id)

    # On the asyncio loop

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue  # the reader has left
            stream.pending.append(output)
            stream.open_samples -= output.finish_reason is not None
            if stream.open_samples == 0:
                stream.ended.set()
            stream.arrived.set()

    def _fail(self, request_id: str, error: BaseException) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.error = error
            stream.ended.set()
            stream.arrived.set()

    def _fail_all(self, error: BaseException) -> None:
        for request_id in list(self._streams):
            self._fail(request_id, EngineFailed(f"The engine raised in a step: {error!r}"))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
