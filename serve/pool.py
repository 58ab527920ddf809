"""The gateway's view of the replicas: requests go in, outputs come out, losses are mended where they can be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from thornback.contracts import EngineLoad, InvalidRequest, Output, Request
from thornback.serve.errors import RETRY_AFTER, BadRequest, TimedOut, Unavailable
from thornback.serve.replica import EngineDescription

logger = logging.getLogger("ray.serve")
MAX_ATTEMPTS = 3
LOAD_TIMEOUT_S = 5.0


class ReplicaPool:
    """Sends requests to a deployment of `Replica`.

    A request that a dying replica leaves is given to another: from its beginning while nothing of it was seen, and
    after the tokens that were seen where it has a single sample (draws depend on seed and position only, so it
    goes on as if nothing had happened). Otherwise it ends with `Unavailable`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def generate(self, request: Request, streaming: bool, timeout_s: float) -> AsyncGenerator[list[Output], None]:
        """Outputs of `request`, whose seed must be set. Raises `BadRequest`, `Unavailable` or `TimedOut`."""
        seen: list[int] = []
        started = False
        deadline = asyncio.get_running_loop().time() + timeout_s
        for attempt in range(MAX_ATTEMPTS):
            items = self._streaming.generate.remote(_rest(request, tuple(seen)), streaming, timeout_s)
            try:
                while (outputs := await _next(items, deadline)) is not None:
                    started = True
                    if request.sampling.n == 1:
                        seen += [token for output in outputs for token in output.token_ids]
                    yield outputs
                return
            except TimeoutError as error:
                raise TimedOut(f"The answer was not complete after {timeout_s:g} seconds.", code="timeout") from error
            except Exception as error:
                self._judge(error, request, started, attempt)
            finally:
                items.cancel()  # does nothing to a stream that has ended
            await asyncio.sleep(0.1 * 2**attempt)  # Serve learns of the loss

    def _judge(self, error: Exception, request: Request, started: bool, attempt: int) -> None:
        """Return if the request may be tried again; raise what the client is to see otherwise."""
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, InvalidRequest):
            raise BadRequest(str(cause)) from error
        if isinstance(cause, TimeoutError):  # the replica's clock was the first
            raise TimedOut("The answer was not complete in time.", code="timeout") from error
        lost = isinstance(error, RayActorError | RayServeException) and not isinstance(error, BackPressureError)
        if lost and attempt + 1 < MAX_ATTEMPTS and (not started or request.sampling.n == 1):
            logger.warning("A replica was lost under request %s; trying another.", request.request_id)
            return
        logger.error("Request %s failed: %s", request.request_id, error)
        raise Unavailable(
            "The replica that worked on this request was lost; send it again.", code="replica_lost", headers=RETRY_AFTER
        ) from error

    async def describe(self, timeout_s: float) -> EngineDescription:
        """Raises `Unavailable` while no replica is ready."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._handle.describe.remote()
        except (TimeoutError, RayActorError, RayServeException) as error:
            raise Unavailable("No replica is ready yet.", code="not_ready", headers=RETRY_AFTER) from error

    async def loads(self) -> dict[str, EngineLoad]:
        """The load of every replica, by its id; those that do not answer in time are left out."""
        try:
            answers = await self._handle.broadcast("load").results_async(
                timeout_s=LOAD_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayServeException):
            return {}
        return {str(i): load for i, load in enumerate(answers) if isinstance(load, EngineLoad)}


async def _next(items: Any, deadline: float) -> list[Output] | None:
    """The next item of a stream, None at its end. Raises `TimeoutError` at `deadline` (the loop's time)."""
    async with asyncio.timeout_at(deadline):
        return await anext(items, None)


def _rest(request: Request, seen: tuple[int, ...]) -> Request:
    if not seen:
        return request
    return replace(request, output_token_ids=seen, sampling=replace(request.sampling, prompt_logprobs=None))
