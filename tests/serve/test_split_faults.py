"""What happens to 16 streaming clients of two pools and two gateways when any of the processes is killed or stops."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import count

import httpx
import openai
import pytest

from tests.serve.test_split import KEY, MODEL, answer, answers, check_all_free, mixed_requests

BACK_S = 150.0  # 20 s to see that one hangs, 20 s until it is killed; and one starts on two cores that others use too


@pytest.fixture(scope="module")
def fragile(serve, byte_model):
    return serve(
        byte_model,
        "--pd",
        "gateway_replicas=2",
        f"served_model_name={MODEL}",
        "threads_per_replica=1",
        "engine.kv_cache_memory_bytes=3000000",
        "engine.max_model_len=1024",
        "split_tokens=8",
    )


@pytest.fixture(scope="module")
def requests() -> list[dict]:
    chosen = [
        {**r, "stream": True, "max_tokens": max(12, r["max_tokens"])} for r in mixed_requests(160) if "n" not in r
    ]
    assert len(chosen) > 100
    return chosen


@pytest.fixture(scope="module")
def wanted(server, requests) -> list:
    """What an undisturbed server says."""
    return answers(server, requests, 16)


def under_load(server, requests: list[dict], fault, after_s: float = 2.0) -> tuple[list, list[float]]:
    """The answers, or the errors, of 16 clients, of whom `fault()` befalls the server; and how long after it those
    began that failed."""
    numbers, results, late = count(), [None] * len(requests), []
    happened = float("inf")

    async def client(asker: openai.AsyncOpenAI) -> None:
        while (i := next(numbers)) < len(requests):
            began = time.monotonic()
            try:
                results[i] = await answer(asker, requests[i])
            except Exception as error:
                results[i] = error
                late.append(began - happened)

    async def main() -> None:
        nonlocal happened
        http = httpx.AsyncClient(trust_env=False, timeout=120)
        asker = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=http)
        async with asker:
            clients = [asyncio.create_task(client(asker)) for _ in range(16)]
            await asyncio.sleep(after_s)
            happened = time.monotonic()
            fault()
            await asyncio.gather(*clients)

    asyncio.run(main())
    return results, late


def check_back_to_normal(server, requests, wanted, lost: set[str]) -> None:
    """Nothing is held; a new replica takes the place of the one that was lost, and keys and values go to and fro."""
    check_all_free(server)
    deadline = time.monotonic() + BACK_S
    while (len(there := server.engines()) < 2 or there & lost) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(there) == 2
    assert not there & lost
    assert answers(server, requests[:40], 16) == wanted[:40]
    assert server.metric("thornback:kv_transfer_requests_total") > 0
    check_all_free(server)


@pytest.mark.full
@pytest.mark.parametrize("deployment", ["Prefill", "Decode"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_that_is_lost_changes_no_answer(fragile, requests, wanted, deployment, how):
    (victim,) = fragile.replica_pids(deployment)
    lost = {engine for engine in fragile.engines() if engine.startswith(deployment)}
    results, late = under_load(fragile, requests, lambda: os.kill(victim, how))
    assert not late
    assert results == wanted
    check_back_to_normal(fragile, requests, wanted, lost)


@pytest.mark.full
def test_a_gateway_that_is_killed_takes_its_own_streams_along_and_nothing_else(fragile, requests, wanted):
    """Where requests go (the placer) is the gateway's to decide, so this is the placer's loss too."""
    victim, _ = fragile.replica_pids("Gateway")
    results, late = under_load(fragile, requests, lambda: os.kill(victim, signal.SIGKILL))
    failed = [i for i, result in enumerate(results) if isinstance(result, Exception)]
    assert len(failed) <= 16
    assert all(seconds < 0 for seconds in late)  # they were under way
    assert [r for i, r in enumerate(results) if i not in failed] == [w for i, w in enumerate(wanted) if i not in failed]
    # Replicas give up what the dead gateway asked after 15 s; what one of them offered, for want of a word, after 30.
    check_all_free(fragile, 75.0)
    check_back_to_normal(fragile, requests, wanted, set())
    deadline = time.monotonic() + BACK_S  # the other one answers meanwhile, so nothing above waited for it
    while len(there := fragile.replica_pids("Gateway")) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(there) == 2
    assert victim not in there
