"""A pool of replicas that compute prompts, and one that answers: the same text, whatever happens to either."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections.abc import Callable

import httpx
import openai
import pytest

MODEL, KEY = "tiny", "secret-key"  # of the server that all tests share; the other wants none


@pytest.fixture(scope="module")
def split(serve, byte_model):
    """Two pools whose caches hold a few requests only, so that some find no room."""
    return serve(
        byte_model,
        "--pd",
        f"served_model_name={MODEL}",
        "threads_per_replica=1",
        "engine.kv_cache_memory_bytes=1500000",
        "engine.max_model_len=1024",
        "split_tokens=8",
    )


def mixed_requests(count: int) -> list[dict]:
    """Of all lengths, with prompts that begin alike, greedy and sampled."""
    rng = random.Random(7)
    beginnings = [[rng.randrange(3, 250) for _ in range(n)] for n in (40, 200, 400)]
    requests = []
    for i in range(count):
        begin = rng.choice(beginnings)[: rng.randrange(0, 400)]
        prompt = [*begin, *(rng.randrange(3, 250) for _ in range(1 + int(2 ** rng.uniform(0, 8))))]
        sampling = rng.choice([{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
        extra = {"ignore_eos": True, **({"top_k": 20} if i % 5 == 0 else {})}
        more = {"n": 2} if i % 11 == 0 else {}
        body = {"prompt": prompt, "max_tokens": rng.choice([1, 2, 12, 40]), "seed": i, "logprobs": 1}
        requests.append({"model": MODEL, **body, **sampling, **more, "extra_body": extra, "stream": i % 3 == 0})
    return requests


async def answer(client: openai.AsyncOpenAI, request: dict) -> list[tuple[str, str]]:
    if not request["stream"]:
        choices = (await client.completions.create(**request)).choices
        return [(choice.text, choice.finish_reason) for choice in choices]
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    async for chunk in await client.completions.create(**request):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index, "")
    return [(texts[i], reasons[i]) for i in sorted(texts)]


def answers(server, requests: list[dict], at_once: int) -> list[list[tuple[str, str]]]:
    async def main():
        gate = asyncio.Semaphore(at_once)
        http = httpx.AsyncClient(trust_env=False, timeout=120)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, http_client=http) as c:

            async def one(request):
                async with gate:
                    return await answer(c, request)

            return await asyncio.gather(*(one(request) for request in requests))

    return asyncio.run(main())


def check_same(split, server, requests: list[dict]) -> None:
    """Both pools together say what `server`'s one replica says."""
    before, failures = (split.metric(f"thornback:kv_transfer_{what}_total") for what in ("requests", "failures"))
    pairs = zip(answers(split, requests, 16), answers(server, requests, 16), strict=True)
    # A draw on the border of two tokens may go either way: who else is in a batch changes how sums are rounded.
    assert sum(ours != theirs for ours, theirs in pairs) <= len(requests) // 100
    # Some find no room, and some are better computed where they are answered.
    assert split.metric("thornback:kv_transfer_requests_total") - before > 0.1 * len(requests)
    assert split.metric("thornback:kv_transfer_failures_total") == failures
    check_all_free(split)


def check_all_free(server, within_s: float = 20.0) -> None:
    """No block is held once nobody asks."""
    wait_until(lambda: cache_use(server) == 0, within_s)


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Fails if it does not come; a lease that nobody gives back lasts for 30 s."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def cache_use(server) -> float | None:
    """Of all replicas; None where the gateway that answers knows of none yet."""
    values = re.findall(r"^vllm:kv_cache_usage_perc{.*} (\S+)$", server.page(), re.MULTILINE)
    return sum(map(float, values)) if values else None


def test_split_serving_says_what_one_replica_says(split, server):
    check_same(split, server, mixed_requests(60))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_500_requests_while_replicas_switch_roles_and_samples_are_put_back(serve, byte_model, server):
    """Two replicas of each pool with room for few; those that answer count as busy while they do, so others come to
    help, and go home in every pause."""
    restless = serve(
        byte_model,
        *("prefill_replicas=2", "num_replicas=2", "cpus_per_replica=0.25", "threads_per_replica=1"),
        *("token_seconds=0.0001", "engine.kv_cache_memory_bytes=600000", "engine.max_model_len=1024"),
        *("split_tokens=8", f"served_model_name={MODEL}"),
    )
    lent, over, helped = threading.Event(), threading.Event(), []

    def watch() -> None:
        while not over.wait(0.2):
            if restless.metric("thornback:lent") > 0:
                lent.set()

    watching = threading.Thread(target=watch)
    watching.start()
    requests = [{**r, "max_tokens": 4 * r["max_tokens"]} for r in mixed_requests(500)]
    try:
        for begin in range(0, 500, 125):
            check_same(restless, server, requests[begin : begin + 125])
            helped.append(lent.is_set())
            wait_until(lambda: restless.metric("thornback:lent") == 0)  # who was lent goes home
            lent.clear()
    finally:
        over.set()
        watching.join()
    assert restless.metric("thornback:num_preemptions") > 0
    assert sum(helped) >= 3, helped  # times that one went to help, and came home


@pytest.mark.full
def test_a_client_that_leaves_frees_both_pools(split):
    body = {"model": MODEL, "prompt": [7] * 500, "max_tokens": 400, "ignore_eos": True, "stream": True}
    for wait in (0.0, 0.02, 0.5, *[0.0] * 5):
        url = f"{split.url}/v1/completions"
        with httpx.Client(trust_env=False) as client, client.stream("POST", url, json=body, timeout=60) as response:
            if wait:
                time.sleep(wait)
                next(response.iter_bytes())
        wait_until(lambda: split.metric("vllm:num_requests_running") == split.metric("vllm:kv_cache_usage_perc") == 0)
