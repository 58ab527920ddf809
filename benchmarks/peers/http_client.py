"""A client of any OpenAI-compatible server, in a process of its own: `python -m benchmarks.peers.http_client URL MODEL`
and, as JSON on its input, `Load`'s fields. Prints JSON: seconds of each request, and its own CPU seconds.

Times are those at which chunks arrive: the first token, the second, the end; `at` is the end since the client began.
Where a request is refused with 429, `refused` says after how long.
"""

from __future__ import annotations

import asyncio
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import aiohttp


@dataclass(frozen=True)
class Load:
    """So many requests of random tokens: `at_once` of them at a time, or where `rate` is set so many a second at random
    (Poisson), however many are under way then."""

    num_requests: int
    at_once: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int
    rate: float = 0.0

    def prompts(self, turn: int = 0) -> list[list[int]]:
        """Others in every turn, so that no cache knows them."""
        rng = random.Random(f"{self.seed}/{turn}")
        tokens = range(self.num_requests * self.prompt_tokens)
        flat = [rng.randrange(3, self.vocab_size) for _ in tokens]
        return [flat[i : i + self.prompt_tokens] for i in range(0, len(flat), self.prompt_tokens)]


def percentiles(values: list[float]) -> dict[str, float]:
    """p50 and p90."""
    ordered = sorted(values)
    return {"p50": ordered[len(ordered) // 2], "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]}


def ask(url: str, model: str, load: Load, timeout_s: float = 600.0) -> dict:
    """Run the client; see the module for what comes back."""
    command = [sys.executable, "-m", "benchmarks.peers.http_client", url, model]
    done = subprocess.run(
        command, input=json.dumps(asdict(load)), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"The client of {url} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


async def _one(client: aiohttp.ClientSession, model: str, load: Load, prompt: list[int]) -> dict[str, float]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, arrived, tokens = time.perf_counter(), [], 0
    async with client.post("/v1/completions", json=body) as response:
        if response.status == 429:
            await response.read()
            return {"refused": time.perf_counter() - began}
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            if chunk.get("choices"):
                arrived.append(time.perf_counter() - began)
    if tokens != load.output_tokens:
        raise RuntimeError(f"{tokens} tokens were answered, not {load.output_tokens}")
    return {"first": arrived[0], "second": arrived[1], "end": arrived[-1], "at": time.perf_counter()}


async def _all(url: str, model: str, load: Load) -> dict:
    gate, cpu = asyncio.Semaphore(load.at_once), time.process_time()
    began = time.perf_counter()
    # The leanest of Python's clients: it shares the cores with what it asks.
    session = aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_read=300)
    )
    async with session as client:

        async def one(prompt: list[int]) -> dict[str, float]:
            async with gate:
                return await _one(client, model, load, prompt)

        if load.rate:
            rng, tasks = random.Random(load.seed), []
            for prompt in load.prompts():
                tasks.append(asyncio.create_task(_one(client, model, load, prompt)))
                await asyncio.sleep(rng.expovariate(load.rate))
            requests = await asyncio.gather(*tasks)
        else:
            requests = await asyncio.gather(*(one(prompt) for prompt in load.prompts()))
    for request in requests:
        if "at" in request:
            request["at"] -= began
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "peak_kib": peak, "requests": requests}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_all(sys.argv[1], sys.argv[2], Load(**json.loads(sys.stdin.read()))))))
