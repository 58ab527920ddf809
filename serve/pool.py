"""The gateway's view of the replicas: requests go in, outputs come out, losses are mended where they can be."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError

from thornback.algorithms import Node, Placement, PlacementConfig, Placer, PrefixIndex, Role
from thornback.contracts import InvalidRequest, Output, Request
from thornback.serve.engine_loop import EngineFailed
from thornback.serve.errors import RETRY_AFTER, BadRequest, TimedOut, TooManyRequests, Unavailable
from thornback.serve.fencing import kill_process
from thornback.serve.limits import Deadlines
from thornback.serve.link import ReplicaReport
from thornback.serve.linked_replica import LinkedReplica, ReplicaLost
from thornback.serve.speeds import Speeds
from thornback.serve.weights import WeightKeeper

MAX_ATTEMPTS = 4
LOOK_S, LOOK_EMPTY_S = 1.0, 0.2  # between two looks at who is there; while nobody is
ANSWER_S = 3.0  # for that
FENCE_S = 9.0  # a replica that was given up since it said nothing has so long to come back
READ_AGAIN_S = 10.0  # weights that could not be read
DRAIN_S = 10.0  # a replica that is to end has so long before others go on with its requests
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What a gateway must know of the engines: the longest request in tokens, the size of the vocabulary."""

    max_model_len: int
    vocab_size: int


class ReplicaPool:
    """Sends requests to deployments of `Replica`: one, or two of which the one prefers to compute prompts and the other
    to answer (FlowKV, papers.md section 4). The `Placer` says who does what; where a prompt is split, another replica
    takes over its keys and values after the first token. Either way the tokens are the same.

    A request that a replica leaves, because it died, stopped to answer or is to end, is given to another: from its
    beginning while nothing of it was seen, and after the tokens that were seen where it has a single sample (draws
    depend on seed and position only, so it goes on as if nothing had happened). Otherwise it ends with `Unavailable`.
    """

    def __init__(
        self,
        handles: Mapping[Role, Any],
        config: PlacementConfig,
        weights: WeightKeeper,
        cache_block: int | None = None,
    ) -> None:
        """`cache_block`: tokens of a block of the replicas' prefix caches; None: they have none."""
        self._handles = handles
        self.weights = weights
        self._updating: asyncio.Task[None] | None = None
        self._prefixes = PrefixIndex(cache_block) if cache_block else None
        self._gateway_id = uuid.uuid4().hex
        self._placer = Placer(config)
        self._placer.warm_up()
        self._speeds = Speeds(self._placer)
        self._replicas: dict[str, LinkedReplica] = {}
        self._streams: set[str] = set()
        self._weight_version = 0  # the newest that answers
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking: asyncio.Task[None] | None = None

    async def generate(
        self, request: Request, streaming: bool, deadlines: Deadlines
    ) -> AsyncGenerator[list[Output], None]:
        """Outputs of `request`, whose seed must be set: as they come, or all in one item. Raises `BadRequest`,
        `Unavailable`, `TimedOut` at a deadline (that of the first token, where they come as they are produced), and
        `TooManyRequests` where no replica would begin in time."""
        seen = list(request.output_token_ids)
        started, deadline = bool(seen), asyncio.get_running_loop().time() + deadlines.complete_s
        for attempt in range(MAX_ATTEMPTS):
            # A name of its own: what is left of an attempt at a replica may come there after the next one.
            rest = replace(_rest(request, tuple(seen)), request_id=f"{request.request_id}-{attempt}")
            # What was taken on once is not refused later.
            outputs = self._attempt(rest, streaming, deadline, math.inf if attempt else deadlines.first_token_left())
            try:
                async with aclosing(outputs):
                    while True:
                        async with asyncio.timeout_at(deadlines.first_token_at if streaming and not started else None):
                            items = await anext(outputs, None)
                        if items is None:
                            return
                        started = True
                        if request.sampling.n == 1:
                            seen += [token for output in items for token in output.token_ids]
                        yield items
            except TimeoutError as error:
                if started or asyncio.get_running_loop().time() >= deadline:
                    said = f"The answer was not complete after {deadlines.complete_s:g} seconds."
                else:
                    said = f"The answer had not begun after {deadlines.first_token_s:g} seconds."
                raise TimedOut(said, code="timeout") from error
            except InvalidRequest as error:
                raise BadRequest(str(error)) from error
            except (ReplicaLost, EngineFailed) as error:
                if attempt + 1 == MAX_ATTEMPTS or (started and request.sampling.n > 1):
                    raise _lost(request, error) from error
                logger.warning("Request %s goes on elsewhere: %s.", request.request_id, error)
            except TooManyRequests:
                raise
            except Exception as error:
                raise _lost(request, error) from error

    async def _attempt(
        self, request: Request, streaming: bool, deadline: float, first_token_s: float | None
    ) -> AsyncGenerator[list[Output], None]:
        """Outputs from one place, or two."""
        placed, beginnings = await self._place(request, deadline, first_token_s)
        prefill, decode = self._replicas[placed.prefill], self._replicas[placed.decode]
        clock, hand_over, begun = self._speeds.clock(placed), None, False
        try:
            if placed.split:
                outputs, hand_over = await prefill.prefill(request, deadline, not placed.same_machine)
                clock.tokens(1)
                self._computed(placed.prefill, beginnings)
                yield outputs
                if outputs[0].finish_reason is not None:
                    return
                request = _rest(request, (*request.output_token_ids, *outputs[0].token_ids))

            def arrived() -> None:
                nonlocal hand_over
                prefill.release(hand_over)
                hand_over = None

            asked = decode.ask(request, streaming, deadline, hand_over=hand_over, on_arrival=arrived)
            async with aclosing(asked) as items:
                async for outputs in items:
                    if placed.split:
                        for output in outputs:
                            output.num_cached_tokens = 0  # it was handed over, not found in a cache
                    if not begun:
                        begun = True
                        self._computed(placed.decode, beginnings)
                    clock.tokens(sum(len(output.token_ids) for output in outputs))
                    yield outputs
        finally:
            prefill.release(hand_over)
            clock.close()

    async def _place(
        self, request: Request, deadline: float, first_token_s: float | None
    ) -> tuple[Placement, list[int]]:
        """Where it goes, and the beginnings of its prompt (`PrefixIndex.keys`), which will be cached there."""
        sampling = request.sampling
        whole = sampling.n > 1 or sampling.prompt_logprobs is not None or sampling.json_schema is not None
        await self._wait_for_replicas(deadline - asyncio.get_running_loop().time())
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        beginnings, hits = [], {}
        if self._prefixes is not None and sampling.prompt_logprobs is None:
            beginnings = self._prefixes.keys(tokens, (self._weight_version, request.adapter))
            hits = self._prefixes.hits(beginnings)
        whole = whole or len(self._handles) == 1
        placed = self._placer.place(time.monotonic(), len(tokens), hits, whole, first_token_s)
        if placed is None:
            said = "All replicas are busy, and none would begin in time."
            if first_token_s is not None:  # they need not be
                said = f"No replica is expected to begin within the {max(0.0, first_token_s):.3g} s that are left."
            raise TooManyRequests(said, code="overloaded", headers=RETRY_AFTER)
        return placed, beginnings

    def _computed(self, replica_id: str, beginnings: list[int]) -> None:
        if self._prefixes is not None:
            self._prefixes.computed(replica_id, beginnings)

    async def describe(self, timeout_s: float) -> EngineDescription:
        """Raises `Unavailable` while no replica is ready."""
        try:
            await self._wait_for_replicas(timeout_s, of_each_role=True)
        except TimeoutError as error:
            raise Unavailable("No replica is ready yet.", code="not_ready", headers=RETRY_AFTER) from error
        report = self.reports()[0]
        return EngineDescription(report.max_model_len, report.vocab_size)

    def reports(self) -> list[ReplicaReport]:
        """How every replica that can be asked stands; none at first."""
        self._watch()
        return [linked.report for linked in self._replicas.values() if linked.ready]

    def lent(self) -> set[str]:
        """The replicas that take the other pool's role now."""
        there = {k: linked for k, linked in self._replicas.items() if k in self._placer}
        return {k for k, linked in there.items() if self._placer.acting(k) is not linked.role}

    def close(self) -> None:
        """End what is asked, and the links, so that the replicas may end."""
        for task in (self._looking, self._updating):
            if task is not None:
                task.cancel()
        for linked in list(self._replicas.values()):
            linked.close()

    # Who is there

    async def _wait_for_replicas(self, timeout_s: float, of_each_role: bool = False) -> None:
        """Until there is one, or one of each deployment. Raises `TimeoutError`."""
        self._watch()

        def enough() -> bool:
            there = (linked.role for linked in self._replicas.values() if linked.replica_id in self._placer)
            return set(there) == self._handles.keys() if of_each_role else next(there, None) is not None

        if not enough():
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(enough)

    def _watch(self) -> None:
        if self._looking is None or self._looking.done():
            self._looking = _background(self._look())

    async def _look(self) -> None:
        """Learn which replicas have come, and which Ray Serve is about to end; tell all that this gateway lives, and
        how many it would have."""
        while True:
            for report in self.reports():
                self._speeds.stepped(report.replica_id, report.step_seconds, report.engine.num_running)
            self._placer.look(time.monotonic())
            demand = self._placer.demand()
            await asyncio.gather(*(self._look_for(role, demand[role]) for role in self._handles))
            self._weight_version = max((r.engine.weight_version for r in self.reports()), default=0)
            self._update_weights()
            await asyncio.sleep(LOOK_S if self._replicas else LOOK_EMPTY_S)

    async def _look_for(self, role: Role, demand: float) -> None:
        try:
            asked = self._handles[role].broadcast("here", self._gateway_id, demand)
            answers = await asked.results_async(timeout_s=ANSWER_S, return_exceptions=True)
        except DeploymentUnavailableError:  # there is none
            answers = []
        except Exception as error:  # one of them does not answer: who is there is not known
            logger.warning("The %s replicas could not be looked for: %r", role.name.lower(), error)
            return
        found = {answer.replica_id: answer for answer in answers if isinstance(answer, ReplicaReport)}
        for report in found.values():
            self.weights.learn(report.update)
        for replica_id, report in found.items():
            linked = self._replicas.get(replica_id)
            if linked is None:
                self._replicas[replica_id] = LinkedReplica(
                    self._handles[role], self._gateway_id, report, role, self._streams, self._admit, self._lose
                )
            elif linked.draining_since is not None:
                linked.draining_since = None
                self._admit(linked)
        for linked in [linked for linked in self._replicas.values() if linked.role is role]:
            if linked.replica_id not in found:
                self._drain(linked)

    def _admit(self, linked: LinkedReplica) -> None:
        """It can be asked, once it has the newest weights: a new one has those that the server started with."""
        report = linked.report
        if report.weight_version < self.weights.version:
            self._update_weights()
            return
        if self._prefixes is not None:
            self._prefixes.add_node(report.replica_id, report.num_cache_tokens)
        size = {"capacity": report.num_cache_tokens, "max_num_seqs": report.max_num_seqs}
        self._speeds.add(Node(report.replica_id, report.node_id, linked.role, **size))
        self._tell_who_waits()

    # Other weights

    async def updated(self, version: int, timeout_s: float) -> int:
        """Wait until all replicas have these weights, or newer ones; returns how many they are. Raises
        `TimeoutError`."""
        self._watch()
        async with asyncio.timeout(timeout_s):
            while self._stale(version) or not self._replicas:
                self._update_weights()
                await asyncio.sleep(LOOK_EMPTY_S)
        return len(self._replicas)

    def _stale(self, version: int) -> list[LinkedReplica]:
        """In an order on which all gateways agree."""
        there = (linked for linked in self._replicas.values() if linked.ready and linked.draining_since is None)
        stale = (linked for linked in there if linked.report.weight_version < version)
        return sorted(stale, key=lambda linked: linked.replica_id)

    def _update_weights(self) -> None:
        if self._stale(self.weights.version) and (self._updating is None or self._updating.done()):
            self._updating = _background(self._roll())

    async def _roll(self) -> None:
        """Bring replicas to the newest weights, one after another. One that finishes its requests first gets no others
        meanwhile, if there is another one like it."""
        for linked in self._stale(self.weights.version):
            try:
                stored = await self.weights.stored()
            except Exception as error:
                logger.error("The weights of %s cannot be read: %r", self.weights.newest, error)
                await asyncio.sleep(READ_AGAIN_S)
                return
            others = [x for x in self._replicas.values() if x.role is linked.role and x.replica_id in self._placer]
            if stored.update.in_flight == "finish" and len(others) > 1:
                self._speeds.remove(linked.replica_id)
            try:
                await linked.load_weights(stored)
            except Exception as error:  # it died, or who holds the weights did
                self.weights.forget(stored)
                logger.warning("Replica %s has not got its weights: %r", linked.replica_id, error)
            if not linked.lost and linked.draining_since is None and linked.replica_id not in self._placer:
                self._admit(linked)

    def _drain(self, linked: LinkedReplica) -> None:
        """Ray Serve waits for the end of its requests, and of its link."""
        now = time.monotonic()
        if linked.draining_since is None:
            linked.draining_since = now
            self._speeds.remove(linked.replica_id)
        elif not linked.num_requests:
            linked.close()
        elif now - linked.draining_since > DRAIN_S:
            linked.hand_back()

    def _lose(self, linked: LinkedReplica) -> None:
        self._speeds.forget(linked.replica_id)
        if self._prefixes is not None:
            self._prefixes.remove_node(linked.replica_id)
        del self._replicas[linked.replica_id]
        if linked.silent:
            self._keep(self._fence(linked.report))
        self._tell_who_waits()

    async def _fence(self, report: ReplicaReport) -> None:
        """End a replica that does not come back. Ray Serve would, but a process that hangs as a whole does not hear
        it, and keeps what was set aside for it: no other could take its place for minutes."""
        await asyncio.sleep(FENCE_S)
        if report.replica_id not in self._replicas:
            logger.warning("Replica %s is still silent; its process %d is killed.", report.replica_id, report.pid)
            await asyncio.to_thread(kill_process, report.node_id, report.pid, "ServeReplica")

    def _tell_who_waits(self) -> None:
        async def tell() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._keep(tell())

    def _keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it in the background, to its end."""
        task = _background(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _background(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """In nobody's name: what is asked of a replica in a request's, Ray Serve takes back where that is cancelled."""
    return asyncio.create_task(coroutine, context=contextvars.Context())


def _rest(request: Request, seen: tuple[int, ...]) -> Request:
    if not seen:
        return request
    return replace(request, output_token_ids=seen, sampling=replace(request.sampling, prompt_logprobs=None))


def _lost(request: Request, error: Exception) -> Unavailable:
    logger.error("Request %s failed: %r", request.request_id, error)
    return Unavailable(
        "The replica that worked on this request was lost; send it again.", code="replica_lost", headers=RETRY_AFTER
    )
