"""Requests are let in in order, wait, or are refused; room is never lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from thornback.serve.errors import TooManyRequests
from thornback.serve.limits import Admission


def test_full_queue_is_refused_with_a_time():
    async def main():
        admission = Admission(max_in_flight=1, max_queued=0, queue_timeout_s=1)
        async with admission.admit(1):
            with pytest.raises(TooManyRequests) as refused:
                async with admission.admit(1):
                    pass
        assert int(refused.value.headers["Retry-After"]) >= 1

    asyncio.run(main())


def test_waiting_ends():
    async def main():
        admission = Admission(max_in_flight=1, max_queued=1, queue_timeout_s=0.05)
        async with admission.admit(1):
            with pytest.raises(TooManyRequests, match="within"):
                async with admission.admit(1):
                    pass
        assert (admission.in_flight, admission.num_queued) == (0, 0)

    asyncio.run(main())


def test_order_of_arrival_and_a_request_larger_than_everything():
    async def main():
        admission = Admission(max_in_flight=2, max_queued=10, queue_timeout_s=5)
        order = []

        async def one(name, weight):
            async with admission.admit(weight):
                order.append(name)
                await asyncio.sleep(0.01)

        await asyncio.gather(one("a", 1), one("large", 7), one("b", 1), one("c", 1))
        assert order[:2] == ["a", "large"]
        assert set(order[2:]) == {"b", "c"}
        assert admission.in_flight == 0

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_when_waiters_leave(seed):
    async def main():
        rng = random.Random(seed)
        admission = Admission(max_in_flight=3, max_queued=100, queue_timeout_s=0.02)
        most = 0

        async def one():
            nonlocal most
            async with admission.admit(rng.randint(1, 3)):
                most = max(most, admission.in_flight)
                await asyncio.sleep(rng.random() * 0.01)

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(one()))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.005)
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        unexpected = [
            r for r in results if r is not None and not isinstance(r, TooManyRequests | asyncio.CancelledError)
        ]
        assert not unexpected
        assert most <= 3
        assert (admission.in_flight, admission.num_queued) == (0, 0)

    asyncio.run(main())
