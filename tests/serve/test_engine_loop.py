"""The engine's thread, without Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict

import pytest

from tests.serve.scripted import EXPORT
from thornback.contracts import (
    EngineLoad,
    InvalidRequest,
    Lease,
    Output,
    Request,
    Reservation,
    SamplingParams,
    TransferStats,
)
from thornback.serve.engine_loop import EngineFailed, EngineLoop
from thornback.serve.hand_over import HandOver, Receiver


class CountingEngine:
    """Token t of every sample is t. `broken_at`: the step that raises."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.requests: dict[str, tuple[Request, int]] = {}
        self.aborted: list[str] = []
        self.threads: set[int] = set()
        self.broken_at = broken_at
        self.steps = 0

    def add_request(self, request, kv=None):
        self.threads.add(threading.get_ident())
        if not request.prompt_token_ids:
            raise InvalidRequest("The prompt is empty.")
        self.requests[request.request_id] = (request, 0)

    def abort_request(self, request_id):
        self.threads.add(threading.get_ident())
        self.aborted.append(request_id)
        self.requests.pop(request_id, None)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        self.threads.add(threading.get_ident())
        self.steps += 1
        if self.steps == self.broken_at:
            raise RuntimeError("out of memory")
        time.sleep(0.001)
        outputs = []
        for key, (request, t) in list(self.requests.items()):
            last = t + 1 == request.sampling.max_tokens
            reason = "length" if last else None
            outputs += [Output(key, [t], [-1.0], i, reason) for i in range(request.sampling.n)]
            self.requests[key] = (request, t + 1)
            if last:
                del self.requests[key]
        return outputs

    def load(self):
        return EngineLoad(len(self.requests), 0, 0, 0, 1, 1, 0)


def request(name, max_tokens=50, n=1, prompt=(1,)):
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, n=n))


class Customer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self.rejected: dict[str, Exception] = {}
        self.failure: BaseException | None = None
        self.failed = asyncio.Event()
        self.threads: set[int] = set()

    def deliver(self, outputs):
        self.threads.add(threading.get_ident())
        for output in outputs:
            self.tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ended[output.request_id].set()

    def reject(self, request_id, error):
        self.rejected[request_id] = error
        self.ended[request_id].set()

    def fail(self, error):
        self.failure = error
        self.failed.set()


def run(main, **options):
    async def body():
        engine, customer = CountingEngine(**options), Customer()
        loop = EngineLoop(lambda: engine, customer)
        await loop.ready()
        try:
            async with asyncio.timeout(20):
                await main(loop, engine, customer)
        finally:
            loop.close()

    asyncio.run(body())


def test_every_token_comes_once_and_in_order():
    async def main(loop, engine, customer):
        for i in range(8):
            loop.add(request(f"r{i}", 40 + i, n=2))
        for i in range(8):
            await customer.ended[f"r{i}"].wait()
        assert customer.tokens == {(f"r{i}", sample): list(range(40 + i)) for i in range(8) for sample in (0, 1)}
        assert len(engine.threads) == 1
        assert customer.threads == {threading.get_ident()}
        assert not engine.aborted

    run(main)


def test_an_idle_engine_makes_a_step_now_and_then(monkeypatch):
    """Leases of peers that died end there."""
    monkeypatch.setattr("thornback.serve.engine_loop.IDLE_S", 0.02)

    async def main(loop, engine, customer):
        await asyncio.sleep(0.2)
        assert 2 <= engine.steps < 20

    run(main)


def test_aborting():
    async def main(loop, engine, customer):
        loop.add(request("gone", 100_000))
        await asyncio.sleep(0.05)
        loop.abort("gone")
        assert await loop.call(lambda engine: engine.aborted) == ["gone"]
        assert not engine.requests

    run(main)


def test_a_call_that_nobody_waits_for_any_more_does_not_end_the_engine():
    async def main(loop, engine, customer):
        held, answered = threading.Event(), asyncio.get_running_loop().create_future()
        for function in (lambda engine: held.wait(10), answered.set_result):  # the one runs, the other has not begun
            calling = asyncio.ensure_future(loop.call(function))
            await asyncio.sleep(0.05)
            calling.cancel()
        held.set()
        assert await loop.call(lambda engine: 7) == 7
        assert not answered.done()

    run(main)


@pytest.mark.parametrize("cancelled_at", ["reserving", "fetching"])
def test_who_leaves_while_keys_and_values_come_holds_no_blocks(cancelled_at, monkeypatch):
    held, reserved, released = threading.Event(), [], []

    def reserve(num_tokens):
        if cancelled_at == "reserving":
            held.wait(10)
        lease = Lease(f"lease-{len(reserved)}", time.time() + 30)
        reserved.append(lease)
        return Reservation(lease, (0,))

    def fetch(self, hand_over, reservation):
        held.wait(10)
        return "ipc", TransferStats(1, 1, 1)

    monkeypatch.setattr(Receiver, "_fetch", fetch)

    async def main(loop, engine, customer):
        engine.reserve, engine.release = reserve, released.append
        receiving = asyncio.ensure_future(Receiver(loop).receive(HandOver(EXPORT, "other", [])))
        await asyncio.sleep(0.1)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        held.set()
        while not released:
            await asyncio.sleep(0.01)
        assert released == reserved
        assert await loop.call(lambda engine: 7) == 7

    run(main)


def test_what_the_engine_refuses_reaches_its_request_only():
    async def main(loop, engine, customer):
        loop.add(request("other"))
        loop.add(request("bad", prompt=()))
        for name in ("bad", "other"):
            await customer.ended[name].wait()
        assert isinstance(customer.rejected["bad"], InvalidRequest)
        assert customer.tokens == {("other", 0): list(range(50))}

    run(main)


def test_an_engine_that_raises_does_nothing_from_then_on():
    async def main(loop, engine, customer):
        loop.add(request("r"))
        await customer.failed.wait()
        assert "out of memory" in str(customer.failure)
        assert customer.failure is loop.failure
        with pytest.raises(EngineFailed):
            loop.add(request("later"))
        with pytest.raises(EngineFailed):
            await loop.call(lambda engine: 1)
        loop.abort("r")  # which is of no more interest

    run(main, broken_at=5)


def test_an_engine_that_cannot_be_built():
    async def main():
        def broken():
            raise OSError("no such model")

        with pytest.raises(OSError, match="no such model"):
            await EngineLoop(broken, Customer()).ready()

    asyncio.run(main())


def test_how_far_apart_tokens_come_is_known():
    """But for steps that compute prompts, which take longer."""

    class Slow(CountingEngine):
        def step(self):
            time.sleep(0.3 if any(t == 0 for _, t in self.requests.values()) else 0.01)
            return super().step()

        def load(self):
            return EngineLoad(sum(t > 0 for _, t in self.requests.values()), 0, 0, 0, 1, 1, 0)

    async def main():
        loop = EngineLoop(Slow, Nobody())
        await loop.ready()
        assert loop.step_seconds == 0.0
        for name in "ab":
            loop.add(request(name))
            await asyncio.sleep(0.5)
        assert 0.01 < loop.step_seconds < 0.1
        loop.close()

    asyncio.run(main())


class Nobody:
    def deliver(self, outputs): ...

    def reject(self, request_id, error): ...

    def fail(self, error): ...
