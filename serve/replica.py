"""One engine behind Ray Serve. Speaks tokens only."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import ray
from ray import serve as ray_serve

from thornback.actors.engines import make_engine
from thornback.contracts import (
    Engine,
    EngineConfig,
    KVImport,
    Lease,
    Output,
    Request,
    SamplingParams,
)
from thornback.serve.autoscaling import DEMAND
from thornback.serve.config import EngineSection, SpeculationSection
from thornback.serve.engine_loop import EngineLoop
from thornback.serve.hand_over import HandOver, Receiver, put_export
from thornback.serve.link import Link, LinkItem, ReplicaReport
from thornback.serve.outputs import merge_outputs
from thornback.serve.speculation import make_retrievers
from thornback.serve.weights import StoredWeights, WeightUpdate

FETCH_TIMEOUT_S = 300.0  # for weights, from another machine
SHIPPED_S = 60.0
DRAIN_POLL_S = 0.02
logger = logging.getLogger("ray.serve")


@dataclass(slots=True)
class _Asked:
    """A request of a gateway. `kept`: what is sent when it has ended, unless it is streamed; `said`: its tokens, by
    sample, where guesses are learnt from them."""

    request: Request
    link: Link
    streaming: bool
    ship: bool
    open_samples: int
    kv: KVImport | None = None
    kept: list[Output] = field(default_factory=list)
    said: dict[int, list[int]] = field(default_factory=dict)
    begun: bool = False


class Replica:
    """Owns an engine. What gateways ask for comes back through the `Link` of each, which they must open first; when a
    link ends, so do its requests. `replica_id` of all methods: see `PlacedRouter`."""

    async def __init__(  # type: ignore[misc]
        self, model: str, config: EngineConfig, engine: EngineSection, speculation: SpeculationSection
    ) -> None:
        retrievers, self._learning = make_retrievers(speculation)
        # Torch is imported in the engine's thread, beside Ray's start.
        self._loop = EngineLoop(lambda: make_engine(engine.name, model, config, retrievers, engine.options), self)
        self._links: dict[str, Link] = {}  # by gateway
        self._asked: dict[str, _Asked] = {}  # by request
        self._shipping: set[asyncio.Task[None]] = set()
        self._update: WeightUpdate | None = None
        self._updating, self._open = asyncio.Lock(), asyncio.Event()
        self._open.set()  # else what comes waits for other weights
        # A reference in an item of a stream keeps nothing alive: it is held here, by lease, until it has been fetched.
        self._shipped: dict[str, list[ray.ObjectRef]] = {}
        ready = await self._loop.ready()
        await self._loop.call(_warm_up)
        self._receiver = Receiver(self._loop)
        context = ray_serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._about = {
            "deployment": context.deployment,
            "replica_id": self._id,
            "node_id": ray.get_runtime_context().get_node_id(),
            "num_cache_tokens": ready.load().num_blocks * config.block_size,
            "max_model_len": ready.max_model_len,
            "vocab_size": ready.vocab_size,
            "max_num_seqs": config.max_num_seqs,
            "pid": os.getpid(),
        }
        gc.freeze()  # what is loaded by now stays, and need not be gone through at every collection

    # What gateways ask

    async def connect(self, gateway_id: str, replica_id: str) -> AsyncGenerator[LinkItem, None]:
        """Everything that is to be known of this gateway's requests. Ends at once where another replica is meant."""
        if replica_id != self._id:
            return
        if gateway_id in self._links:
            self._links[gateway_id].close()
        link = self._links[gateway_id] = Link(self._report)
        try:
            async for item in link.items():
                yield item
        finally:
            if self._links.get(gateway_id) is link:
                del self._links[gateway_id]
            for request_id in list(link.request_ids):
                self._end(request_id, abort=True)

    async def ask(
        self,
        gateway_id: str,
        request: Request,
        streaming: bool,
        ship: bool = False,
        hand_over: HandOver | None = None,
        *,
        replica_id: str,
    ) -> bool:
        """Begin a request; False: this is not the replica that was meant, or has no link to this gateway. Outputs come
        as they are produced, or all at the end. Returns once `hand_over`, what another replica has computed of it, has
        arrived. Of a request with `export_kv`, the keys and values are handed over with the first token; `ship`: by the
        object store, since they are to leave this machine."""
        link = self._links.get(gateway_id)
        if replica_id != self._id or link is None:
            return False
        asked = _Asked(request, link, streaming, ship, request.sampling.n)
        self._asked[request.request_id] = asked
        link.request_ids.add(request.request_id)
        if hand_over is not None:
            asked.kv = await self._receiver.receive(hand_over)
        await self._open.wait()
        if self._asked.get(request.request_id) is asked:
            self._loop.add(request, asked.kv)
        else:  # it was aborted meanwhile
            self._receiver.give_back(asked.kv)
        return True

    async def abort(self, request_id: str, replica_id: str) -> None:
        """Nobody waits for the rest of a request."""
        self._end(request_id, abort=True)

    async def release(self, lease: Lease, replica_id: str) -> None:
        """What was handed over has arrived, or is not wanted any more. Ignored where another replica offered it."""
        if replica_id == self._id:
            self._release(lease)

    async def here(self, gateway_id: str = "", demand: float = 0.0) -> ReplicaReport:
        """As of the engine's last step; answers at once, however long a step takes. Raises if the engine failed.
        `demand`: how many replicas like this one the gateway asks for."""
        await self.check_health()
        if gateway_id in self._links:
            self._links[gateway_id].hear(demand)
        return self._report()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `by_demand`."""
        return {DEMAND: sum(link.demand for link in self._links.values())}

    async def load_weights(self, stored: StoredWeights, replica_id: str) -> bool:
        """Answer with other weights from the next step on; older ones than it has change nothing. False: this is not
        the replica that was meant. Raises `RayError` where they cannot be had."""
        if replica_id != self._id:
            return False
        async with self._updating:
            update = stored.update
            if self._update is not None and update.version <= self._update.version:
                return True
            weights = await asyncio.to_thread(stored.fetch, FETCH_TIMEOUT_S)
            try:
                if update.in_flight == "finish":
                    self._open.clear()
                    while await self._loop.call(lambda engine: engine.has_unfinished_requests()):
                        await asyncio.sleep(DRAIN_POLL_S)
                await self._loop.call(lambda engine: engine.load_weights(weights, update.version, update.in_flight))
                self._update = update
            finally:
                self._open.set()
        return True

    async def check_health(self) -> None:
        """Ray Serve's health check: a replica whose engine has failed is replaced."""
        if self._loop.failure is not None:
            raise RuntimeError(f"The engine has failed: {self._loop.failure!r}")

    def _report(self) -> ReplicaReport:
        assert self._loop.load is not None
        receiver = self._receiver
        return ReplicaReport(
            **self._about,
            engine=self._loop.load,
            transfers=dict(receiver.transfers),
            num_transfer_failures=receiver.num_failures,
            update=self._update,
            step_seconds=self._loop.step_seconds,
        )

    # What the engine says

    def deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            asked = self._asked.get(output.request_id)
            if asked is None:  # nobody waits for it
                if output.kv is not None:
                    self._release(output.kv.lease)
                continue
            if self._learning is not None:
                self._learn(asked, output)
            asked.open_samples -= output.finish_reason is not None or output.kv is not None
            if output.kv is not None:
                self._offer(asked, output)
            elif asked.streaming:
                asked.link.push(output, urgent=not asked.begun or not asked.open_samples)
                asked.begun = True
            else:
                asked.kept.append(output)
                if not asked.open_samples:
                    for whole in merge_outputs(asked.kept):
                        asked.link.push(whole, urgent=True)
            if not asked.open_samples:
                self._end(output.request_id)

    def reject(self, request_id: str, error: Exception) -> None:
        asked = self._asked.get(request_id)
        if asked is not None:
            asked.link.fail(request_id, error)
            self._end(request_id)

    def fail(self, error: BaseException) -> None:
        """End the process. A health check would take Ray Serve many seconds to replace this replica; and to lose it is
        what gateways know how to mend."""
        logger.critical("The engine raised in a step; this replica ends.", exc_info=error)
        logging.shutdown()
        os._exit(1)

    def _end(self, request_id: str, abort: bool = False) -> None:
        asked = self._asked.pop(request_id, None)
        if asked is None:
            return
        asked.link.request_ids.discard(request_id)
        if abort:
            self._loop.abort(request_id)
        self._receiver.give_back(asked.kv)

    def _release(self, lease: Lease) -> None:
        self._shipped.pop(lease.lease_id, None)
        self._loop.submit(lambda engine: engine.release(lease))

    def _offer(self, asked: _Asked, output: Output) -> None:
        """Send a first token, and what was computed for it."""
        export, output.kv = output.kv, None
        assert export is not None
        if not asked.ship:
            asked.link.push(output, True, HandOver(export, self._id, []))
            return

        async def ship() -> None:
            try:
                shipped = await self._loop.call(lambda engine: put_export(engine, export))
            except Exception as error:
                logger.warning("Request %s is computed again where it is answered: %s", export.request_id, error)
                self._release(export.lease)
                asked.link.push(output, True)
            else:
                self._shipped[export.lease.lease_id] = shipped
                asyncio.get_running_loop().call_later(SHIPPED_S, self._shipped.pop, export.lease.lease_id, None)
                asked.link.push(output, True, HandOver(export, self._id, shipped))

        task = asyncio.create_task(ship())
        self._shipping.add(task)
        task.add_done_callback(self._shipping.discard)

    def _learn(self, asked: _Asked, output: Output) -> None:
        """Guess from each sample, once it has ended."""
        assert self._learning is not None
        tokens = asked.said.setdefault(output.index, list(asked.request.output_token_ids))
        tokens += output.token_ids
        if output.finish_reason is not None:
            self._learning.append([*asked.request.prompt_token_ids, *tokens])


def _warm_up(engine: Engine) -> None:
    """Answer something, so that what is used for the first time has its time before anybody waits for it."""
    prompt = tuple(range(min(8, engine.vocab_size)))
    for number, temperature in enumerate((0.0, 1.0)):
        sampling = SamplingParams(max_tokens=4, temperature=temperature, ignore_eos=True, seed=0)
        engine.add_request(Request(f"warm-up-{number}", prompt, sampling))
    while engine.has_unfinished_requests():
        engine.step()
    engine.flush_prefix_cache()
