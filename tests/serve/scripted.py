"""Deployments of replicas that a script answers, behind the handles of which a pool knows."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import replace

from ray.exceptions import ActorDiedError

from thornback.contracts import EngineLoad, KVExport, Lease, Output, Request
from thornback.serve.hand_over import HandOver
from thornback.serve.link import Link, ReplicaReport

LOAD = EngineLoad(0, 0, 0, 0, 1000, 1000, 0)
EXPORT = KVExport("r", (), 300, (), "", Lease("lease", 0.0), "float32", (1,), 0)
FOREVER, LOST, SILENT = object(), object(), object()
CLIENT = contextvars.ContextVar("client", default=None)  # in whose name replicas are asked


def token(value: int, reason: str | None = None, index: int = 0) -> Output:
    return Output("r", [value], [-1.0], index, reason, num_cached_tokens=300)  # type: ignore[arg-type]


def counting(request: Request) -> list:
    """Token t is t, up to max_tokens."""
    last = request.sampling.max_tokens
    return [token(t, "length" if t == last else None) for t in range(len(request.output_token_ids) + 1, last + 1)]


class Response:
    """What a handle's call returns."""

    def __init__(self, coroutine) -> None:
        self._task = asyncio.ensure_future(coroutine)

    def __await__(self):
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Stream:
    def __init__(self, items) -> None:
        self._items, self.cancelled = items, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        return await anext(self._items)

    def cancel(self) -> None:
        self.cancelled = True


class Replica:
    """Answers each request by the next script: outputs, errors that the engine raises, LOST (the process dies), SILENT
    (it stops) or FOREVER; then by counting. Notes what it is asked."""

    def __init__(self, name: str, *scripts) -> None:
        self.name, self.scripts = name, list(scripts)
        self.alive, self.draining, self.stopped = True, False, False
        self.asked: list[Request] = []
        self.shipped: list[bool] = []
        self.taken: list[HandOver | None] = []
        self.aborted: list[str] = []
        self.released: list[Lease] = []
        self.links: list[Link] = []
        self.playing: list[asyncio.Future] = []

    def report(self) -> ReplicaReport:
        return ReplicaReport("D", self.name, "node", 32_000, LOAD, 2048, 256)

    async def items(self):
        link = Link(self.report)
        self.links.append(link)
        async for item in link.items():
            if not self.alive:
                raise ActorDiedError
            if self.stopped:
                await asyncio.sleep(3600)
            yield item

    async def answer(self, request: Request, ship: bool, hand_over: HandOver | None) -> bool:
        if not self.alive:
            raise ActorDiedError
        self.asked.append(request)
        self.shipped.append(ship)
        self.taken.append(hand_over)
        link = self.links[-1]
        link.request_ids.add(request.request_id)
        self.playing.append(asyncio.ensure_future(self.play(request, link)))
        return True

    async def play(self, request: Request, link: Link) -> None:
        if request.export_kv:
            first = replace(token(len(request.output_token_ids) + 1), request_id=request.request_id)
            link.push(first, True, HandOver(EXPORT, self.name, []))
            return
        for step in self.scripts.pop(0) if self.scripts else counting(request):
            await asyncio.sleep(0.001)
            if step is FOREVER or request.request_id in self.aborted:
                return
            if step is LOST:
                self.alive = False
                link.close()
                link.push(token(0), True)
            elif step is SILENT:
                self.stopped = True
                return
            elif isinstance(step, Exception):
                link.fail(request.request_id, step)
            else:
                link.push(replace(step, request_id=request.request_id), True)


class Handle:
    """A deployment of these."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = list(replicas)
        self.ask, self.abort, self.release, self.connect = (
            _Method(call) for call in (self._ask, self._abort, self._release, self._connect)
        )

    def options(self, stream: bool) -> Handle:
        assert stream
        return self

    def broadcast(self, method: str, gateway_id: str, demand: float):
        assert method == "here"
        assert CLIENT.get() is None
        self.demand = demand
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list:
        assert return_exceptions
        there = [r for r in self.replicas if not r.draining]
        if any(r.stopped for r in there):
            raise TimeoutError
        return [r.report() if r.alive else ActorDiedError() for r in there]

    def _named(self, replica_id: str) -> Replica:
        return next(r for r in self.replicas if r.name == replica_id)

    def _connect(self, gateway_id: str, replica_id: str) -> Stream:
        return Stream(self._named(replica_id).items())

    def _ask(self, gateway_id, request, streaming, ship, hand_over, replica_id) -> Response:
        return Response(self._named(replica_id).answer(request, ship, hand_over))

    def _abort(self, request_id: str, replica_id: str) -> None:
        self._named(replica_id).aborted.append(request_id)

    def _release(self, lease: Lease, replica_id: str) -> None:
        self._named(replica_id).released.append(lease)


class _Method:
    def __init__(self, call: Callable) -> None:
        self.call = call

    def remote(self, *arguments, **more):
        assert CLIENT.get() is None, "Ray Serve takes it back when the client leaves"
        return self.call(*arguments, **more)
