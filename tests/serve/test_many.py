"""Many requests at once, and clients that leave."""

from __future__ import annotations

import asyncio
import time

import httpx
import openai
import pytest

MODEL = "tiny"
KEY = "secret-key"


def requests():
    """32 requests of all kinds."""
    prompts = ["short", "a longer prompt that shares " * 3, "é€😀", "x"]
    for i in range(32):
        common = {"model": MODEL, "seed": i, "temperature": (0.0, 1.0, 0.7)[i % 3]}
        if i % 4 == 3:
            messages = [{"role": "user", "content": prompts[i % 3]}]
            yield "chat", {**common, "messages": messages, "max_tokens": 30 + i}
        else:
            extra = {"ignore_eos": bool(i % 2)}
            stop = ["e"] if i % 5 == 0 else None
            yield "text", {**common, "prompt": prompts[i % 4], "max_tokens": 20 + i, "stop": stop, "extra_body": extra}


async def answer(client, kind, body, stream):
    if kind == "chat":
        if not stream:
            choice = (await client.chat.completions.create(**body)).choices[0]
            return choice.message.content, choice.finish_reason
        chunks = await client.chat.completions.create(**body, stream=True)
        choices = [choice async for chunk in chunks for choice in chunk.choices]
        return "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
    if not stream:
        choice = (await client.completions.create(**body)).choices[0]
        return choice.text, choice.finish_reason
    chunks = await client.completions.create(**body, stream=True)
    choices = [choice async for chunk in chunks for choice in chunk.choices]
    return "".join(c.text for c in choices), choices[-1].finish_reason


def test_32_mixed_streams_equal_single_runs(server):
    async def main():
        http = httpx.AsyncClient(trust_env=False, timeout=120)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, http_client=http) as client:
            together = await asyncio.gather(
                *(answer(client, kind, body, i % 3 > 0) for i, (kind, body) in enumerate(requests()))
            )
            alone = [await answer(client, kind, body, False) for kind, body in requests()]
        assert together == alone

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(server, http, stream):
    body = {"model": MODEL, "prompt": "go on", "max_tokens": 8000, "n": 16, "ignore_eos": True, "stream": stream}
    began = server.metric("vllm:generation_tokens_total")
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            assert server.metric("vllm:num_requests_running") == 16
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=1.0)
    deadline = time.monotonic() + 20
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert server.metric("vllm:generation_tokens_total") - began < 16 * 8000


def test_metrics_count(server, http):
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total")
    before = [server.metric(name) for name in names]
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 7, "n": 2, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [3, 14, 2]
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert server.metric(f"vllm:{name}_count") > 0
