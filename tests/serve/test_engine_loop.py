"""The engine's thread and the streams out of it, without Ray."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from thornback.contracts import EngineLoad, InvalidRequest, Output, Request, SamplingParams
from thornback.serve.engine_loop import EngineFailed, EngineLoop
from thornback.serve.outputs import merge_outputs


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


async def collect(loop, wanted, gap_s):
    items = [item async for item in loop.stream(wanted, gap_s)]
    tokens = [[] for _ in range(wanted.sampling.n)]
    for item in items:
        for output in item:
            tokens[output.index] += output.token_ids
    return tokens, len(items)


def run(main, on_failure=None, **options):
    async def body():
        engine = CountingEngine(**options)
        loop = EngineLoop(lambda: engine, on_failure)
        await loop.ready()
        try:
            async with asyncio.timeout(20):
                await main(loop, engine)
        finally:
            loop.close()

    asyncio.run(body())


@pytest.mark.parametrize("gap_s", [0.0, 0.02, None])
def test_every_token_comes_once_and_in_order(gap_s):
    async def main(loop, engine):
        results = await asyncio.gather(*(collect(loop, request(f"r{i}", 40 + i, n=2), gap_s) for i in range(8)))
        for i, (tokens, count) in enumerate(results):
            assert tokens == [list(range(40 + i))] * 2
            if gap_s is None:
                assert count == 1
            elif gap_s:
                assert count < 20
        assert len(engine.threads) == 1
        assert loop.num_streams == 0
        assert not engine.aborted

    run(main)


@pytest.mark.parametrize("gap_s", [0.0, None])
def test_leaving_aborts(gap_s):
    async def main(loop, engine):
        task = asyncio.create_task(collect(loop, request("gone", 100_000), gap_s))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await loop.call(lambda engine: engine.aborted) == ["gone"]
        assert not engine.requests

    run(main)


def test_what_the_engine_refuses_reaches_its_request_only():
    async def main(loop, engine):
        other = asyncio.create_task(collect(loop, request("other"), 0.0))
        with pytest.raises(InvalidRequest, match="empty"):
            await collect(loop, request("bad", prompt=()), 0.0)
        assert (await other)[0] == [list(range(50))]

    run(main)


def test_an_engine_that_raises_fails_everything_from_then_on():
    failures = []

    async def main(loop, engine):
        results = await asyncio.gather(
            *(collect(loop, request(f"r{i}"), 0.0) for i in range(3)), return_exceptions=True
        )
        assert all(isinstance(result, EngineFailed) for result in results)
        assert "out of memory" in str(results[0])
        with pytest.raises(EngineFailed):
            await collect(loop, request("later"), 0.0)
        assert failures == [loop.failure]

    run(main, on_failure=failures.append, broken_at=5)


def test_an_engine_that_cannot_be_built():
    async def main():
        def broken():
            raise OSError("no such model")

        with pytest.raises(OSError, match="no such model"):
            await EngineLoop(broken).ready()

    asyncio.run(main())


def test_merged_outputs():
    top = [[(1, -0.5)]]
    parts = [
        Output("r", [1], [-1.0], 0, None, 3, 8, top, [None]),
        Output("r", [5], [-5.0], 1, "stop", 3),
        Output("r", [2], [-2.0], 0, "length", 4, 0, top),
    ]
    first, second = merge_outputs(parts)
    assert second is parts[1]
    assert first == Output("r", [1, 2], [-1.0, -2.0], 0, "length", 4, 8, top * 2, [None])
