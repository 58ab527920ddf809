"""Between a gateway and a replica: one stream for the tokens of all requests, so that it costs as much as steps do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field

from thornback.contracts import EngineLoad, Output, TransferStats
from thornback.serve.hand_over import HandOver
from thornback.serve.outputs import wait_for_event
from thornback.serve.weights import WeightUpdate

# An item costs about 1 ms of work in the processes that it passes. With several requests, items lie this far apart,
# but for first tokens and ends.
GAP_S = 0.003
HEARTBEAT_S = 0.5  # an item comes at least as often
GATEWAY_SILENCE_S = 15.0  # then nobody waits for the answers any more


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """How a replica of a deployment stands: its id and its node's, the tokens that its cache holds, its engine's load,
    the longest request in tokens, the size of its vocabulary, the samples of a step, the process; and what it has taken
    over from others, by the way that was taken. `num_transfer_failures`: how often that failed, and a request was
    computed again. `update`: where its weights are from, unless they are those that it started with. `step_seconds`:
    between two tokens of a sample, of late; 0: none have come yet."""

    deployment: str
    replica_id: str
    node_id: str
    num_cache_tokens: int
    engine: EngineLoad
    max_model_len: int = 0
    vocab_size: int = 0
    max_num_seqs: int = 256
    pid: int = 0
    transfers: Mapping[str, TransferStats] = field(default_factory=dict)
    num_transfer_failures: int = 0
    update: WeightUpdate | None = None
    step_seconds: float = 0.0

    @property
    def weight_version(self) -> int:
        return self.update.version if self.update is not None else 0


@dataclass(slots=True)
class LinkItem:
    """News of a replica, and of its requests by their ids: what they have produced, what they hand over with that, and
    what they ended with that was no output."""

    report: ReplicaReport
    outputs: list[Output] = field(default_factory=list)
    hand_overs: dict[str, HandOver] = field(default_factory=dict)
    failures: dict[str, Exception] = field(default_factory=dict)


class Link:
    """The replica's end of it, for one gateway."""

    def __init__(self, report: Callable[[], ReplicaReport]) -> None:
        self._report = report
        self._closed = False
        self._news = asyncio.Event()
        self._urgent = asyncio.Event()
        self._outputs: list[Output] = []
        self._hand_overs: dict[str, HandOver] = {}
        self._failures: dict[str, Exception] = {}
        self.request_ids: set[str] = set()  # those that have not ended
        self.hear()

    def push(self, output: Output, urgent: bool, hand_over: HandOver | None = None) -> None:
        self._outputs.append(output)
        if hand_over is not None:
            self._hand_overs[output.request_id] = hand_over
        self._wake(urgent)

    def fail(self, request_id: str, error: Exception) -> None:
        self._failures[request_id] = error
        self._wake(True)

    def hear(self, demand: float = 0.0) -> None:
        """The gateway lives, and asks for so many replicas."""
        self.demand = demand
        self._heard = time.monotonic()

    def close(self) -> None:
        """End its items."""
        self._closed = True
        self._wake(True)

    def _wake(self, urgent: bool) -> None:
        self._news.set()
        if urgent:
            self._urgent.set()

    async def items(self) -> AsyncGenerator[LinkItem, None]:
        """Until it is closed, or the gateway was not heard of for too long. The first comes at once."""
        while not self._closed and time.monotonic() - self._heard < GATEWAY_SILENCE_S:
            self._news.clear()
            self._urgent.clear()
            item = LinkItem(self._report(), self._outputs, self._hand_overs, self._failures)
            self._outputs, self._hand_overs, self._failures = [], {}, {}
            yield item
            if len(self.request_ids) > 1:
                await wait_for_event(self._urgent, GAP_S)
            await wait_for_event(self._news, HEARTBEAT_S)
