"""The gateway's end of a link to one replica."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import RayTaskError

from thornback.algorithms import Role
from thornback.contracts import Output, Request
from thornback.serve.hand_over import HandOver
from thornback.serve.link import LinkItem, ReplicaReport
from thornback.serve.outputs import OutputStream
from thornback.serve.weights import StoredWeights

SILENCE_S = 6.0  # a replica that has said nothing for so long is given up; it speaks twice a second
# A chunk of a stream costs about 2 ms on its way through Ray Serve's proxy. Chunks of one stream lie this far apart for
# every other stream of the gateway.
GAP_PER_STREAM_S = 0.003
logger = logging.getLogger("ray.serve")


class ReplicaLost(Exception):
    """A replica ended, stopped to answer, or is to end; its requests are to go on elsewhere."""


class LinkedReplica:
    """Asks one replica of `handle`'s deployment. `report` is never older than half a second, until it is lost."""

    def __init__(
        self,
        handle: Any,
        gateway_id: str,
        report: ReplicaReport,
        role: Role,
        streams: set[str],
        on_ready: Callable[[LinkedReplica], None],
        on_lost: Callable[[LinkedReplica], None],
    ) -> None:
        """`streams`: the ids of all requests of the gateway that are streamed now. `on_ready` is called once the link
        stands, `on_lost` once it has ended, for whatever reason."""
        self.report, self.role = report, role
        self.replica_id = report.replica_id
        self.lost = self.silent = False
        self.draining_since: float | None = None  # Ray Serve counts it to the deployment no more
        self._handle, self._gateway_id = handle, gateway_id
        self._on_ready, self._on_lost, self._streams = on_ready, on_lost, streams
        self._requests: dict[str, tuple[Request, OutputStream]] = {}
        self._hand_overs: dict[str, HandOver] = {}
        self._unwanted: set[str] = set()
        self.ready = False  # the link stands
        self._listening = asyncio.create_task(self._listen())

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    async def ask(
        self,
        request: Request,
        streaming: bool,
        deadline: float,
        ship: bool = False,
        hand_over: HandOver | None = None,
        on_arrival: Callable[[], None] | None = None,
    ) -> AsyncGenerator[list[Output], None]:
        """Outputs of a request; leaving aborts it. `on_arrival` is called once the replica has what `hand_over` offers,
        or cannot have it. See `Replica.ask`, and `OutputStream.items` for `deadline`. Raises `ReplicaLost`, or what the
        engine raises of the request."""
        if self.lost:
            raise ReplicaLost
        stream = OutputStream(request.sampling.n)
        self._requests[request.request_id] = (request, stream)
        if streaming:
            self._streams.add(request.request_id)
        asking = asyncio.ensure_future(self._begin(request, stream, streaming, ship, hand_over, on_arrival))
        try:
            async for outputs in stream.items(deadline, lambda: GAP_PER_STREAM_S * (len(self._streams) - 1)):
                yield outputs
        finally:
            asking.cancel()
            del self._requests[request.request_id]
            self._streams.discard(request.request_id)
            if not stream.complete and not self.lost:
                self._abort(request.request_id)

    async def prefill(self, request: Request, deadline: float, ship: bool) -> tuple[list[Output], HandOver | None]:
        """The first token of a request, and its keys and values for the replica that goes on with it. See `ask`."""
        try:
            async with aclosing(self.ask(replace(request, export_kv=True), False, deadline, ship)) as items:
                outputs = [output async for item in items for output in item]
            return outputs, self._hand_overs.get(request.request_id)
        except BaseException:
            self.release(self._hand_overs.get(request.request_id))
            raise
        finally:
            self._hand_overs.pop(request.request_id, None)

    def release(self, hand_over: HandOver | None) -> None:
        """What the replica has handed over is not wanted any more. Does not wait."""
        if hand_over is not None and not self.lost:
            self._call("release", hand_over.export.lease)

    async def load_weights(self, stored: StoredWeights) -> None:
        """Returns once answers come from them. Raises `ReplicaLost`, and what `Replica.load_weights` raises."""
        if not await self._call("load_weights", stored):
            raise ReplicaLost(f"replica {self.replica_id} is gone")
        self.report = replace(self.report, update=stored.update)

    def hand_back(self) -> None:
        """Have what can go on elsewhere go on there: requests of one sample, and those that have said nothing."""
        for request, stream in self._requests.values():
            if request.sampling.n == 1 or not stream.begun:
                stream.fail(ReplicaLost(f"replica {self.replica_id} is to end"))

    def close(self) -> None:
        self._listening.cancel()

    async def _begin(
        self,
        request: Request,
        stream: OutputStream,
        streaming: bool,
        ship: bool,
        hand_over: HandOver | None,
        on_arrival: Callable[[], None] | None,
    ) -> None:
        response = self._call("ask", self._gateway_id, request, streaming, ship, hand_over)
        try:
            if not await response:
                stream.fail(ReplicaLost(f"replica {self.replica_id} is gone"))
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            stream.fail(_cause(error))
        finally:
            if on_arrival is not None:
                on_arrival()

    def _abort(self, request_id: str) -> None:
        self._call("abort", request_id)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Ask the replica in nobody's name. What is asked in a request's, Ray Serve takes back where that is cancelled:
        its abort, and the release of its blocks, too."""
        call = getattr(self._handle, method).remote
        return contextvars.Context().run(call, *arguments, replica_id=self.replica_id)

    async def _listen(self) -> None:
        items = self._handle.options(stream=True).connect.remote(self._gateway_id, replica_id=self.replica_id)
        reason = "it was taken out of service"
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    item = await anext(items, None)
                if item is None:
                    reason = "it ended the link"
                    break
                self._take(item)
        except TimeoutError:
            self.silent, reason = True, f"it said nothing for {SILENCE_S:g} s"
        except Exception as error:
            reason = repr(error)
        finally:
            items.cancel()
            self._lose(reason)

    def _take(self, item: LinkItem) -> None:
        newer = self.report.weight_version > item.report.weight_version  # an item that was under way while weights came
        self.report = replace(item.report, update=self.report.update) if newer else item.report
        if not self.ready:
            self.ready = True
            self._on_ready(self)
        for request_id, hand_over in item.hand_overs.items():
            if request_id in self._requests:
                self._hand_overs[request_id] = hand_over
            else:
                self.release(hand_over)
        for output in item.outputs:
            asked = self._requests.get(output.request_id)
            if asked is not None:
                request, stream = asked
                stream.push(output)
                if request.export_kv:
                    stream.end()
            elif output.finish_reason is None and output.request_id not in self._unwanted:
                # Its abort was there before it.
                self._unwanted.add(output.request_id)
                self._abort(output.request_id)
        for request_id, error in item.failures.items():
            if request_id in self._requests:
                self._requests[request_id][1].fail(error)

    def _lose(self, reason: str) -> None:
        self.lost = True
        if self._requests:
            logger.warning("Replica %s is lost under %d requests: %s.", self.replica_id, len(self._requests), reason)
        for _, stream in self._requests.values():
            stream.fail(ReplicaLost(f"replica {self.replica_id}: {reason}"))
        self._on_lost(self)


def _cause(error: Exception) -> Exception:
    """What a request failed with: a `ReplicaLost`, unless the replica's own code raised."""
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    return ReplicaLost(repr(error))
