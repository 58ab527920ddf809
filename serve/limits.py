"""How much the gateway takes on at a time, and until when."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from thornback.serve.errors import TooManyRequests


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Of one request: seconds from its admission to its last token; and from its arrival to its first, which is to be
    there at `first_token_at` (the event loop's time), where it asks for that."""

    complete_s: float
    first_token_s: float | None = None
    first_token_at: float | None = None

    def first_token_left(self) -> float | None:
        """Seconds until then."""
        return None if self.first_token_at is None else self.first_token_at - asyncio.get_running_loop().time()


class Admission:
    """At most `max_in_flight` sequences at a time, in order of arrival; `max_queued` requests may wait for room.

    A request larger than everything that may be in flight is let in when it is alone.
    """

    def __init__(self, max_in_flight: int, max_queued: int, queue_timeout_s: float) -> None:
        self._capacity = max_in_flight
        self._max_queued = max_queued
        self._timeout_s = queue_timeout_s
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.in_flight = 0

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def admit(self, num_sequences: int, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Hold room for `num_sequences`; raises `TooManyRequests` if there is none, or none in time (`timeout_s`, where
        that is shorter than others wait)."""
        weight = min(num_sequences, self._capacity)
        if self._waiting or self.in_flight + weight > self._capacity:
            await self._wait(weight, self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s))
        else:
            self.in_flight += weight
        try:
            yield
        finally:
            self.in_flight -= weight
            self._let_in()

    async def _wait(self, weight: int, timeout_s: float) -> None:
        if len(self._waiting) >= self._max_queued:
            raise self._refusal("The server is full")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (weight, turn)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not turn.cancelled():  # it was let in just as it gave up
                self.in_flight -= weight
            self._let_in()
            if isinstance(error, TimeoutError):
                raise self._refusal(f"No room came free within {timeout_s:g} seconds") from error
            raise

    def _let_in(self) -> None:
        while self._waiting and self.in_flight + self._waiting[0][0] <= self._capacity:
            weight, turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += weight
                turn.set_result(None)

    def _refusal(self, reason: str) -> TooManyRequests:
        seconds = max(1, math.ceil(min(30, 1 + len(self._waiting) / max(self._capacity, 1))))
        return TooManyRequests(
            f"{reason}: {self.in_flight} sequences are in work and {len(self._waiting)} requests wait; "
            f"try again in {seconds} s.",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(seconds)},
        )
