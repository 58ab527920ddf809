"""Generating: 64 prompts that share 8 prefixes, 64 tokens each, a model of 3.7M parameters, float32, all cores.

`vs_hf_generate`: our tokens per second over those of `transformers`' `generate`; `vs_vllm`: over those of vLLM on
CPU with as many threads, in whichever of its configurations is the fastest here. Every peer is one process with one
engine. New tokens count, prompts do not; the time is from the prompts' token ids to the last new one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import QUICK_ROUNDS, ROUNDS, Peer, Turns, alternate
from benchmarks.models import benchmark_model, cores
from benchmarks.peers import vllm_generate
from benchmarks.results import Results, run
from benchmarks.workload import Workload
from thornback.engine import ACTOR_ENVIRONMENT

SIZE = "3.7M"
OURS, HF = "thornback", "transformers generate"


def peers(model: str, work: Workload, threads: int, quick: bool) -> list[Peer]:
    settings: dict[str, Any] = {"model": model, "workload": work.settings()}
    threaded = {**settings, "threads": threads}
    plain = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None, "OMP_NUM_THREADS": str(threads)}
    return [
        Peer(OURS, "benchmarks.peers.thornback_engine:rollout", threaded, ACTOR_ENVIRONMENT),
        Peer(HF, "benchmarks.peers.hf_generate:rollout", threaded, plain),
        *(
            Peer(
                f"vllm {'eager' if eager else 'compiled'}{', Intel OpenMP' if intel else ''}",
                "benchmarks.peers.vllm_generate:rollout",
                {**settings, "eager": eager},
                vllm_generate.environment(threads, intel),
            )
            for eager, intel in (
                [(True, False)] if quick else [(False, False), (False, True), (True, False), (True, True)]
            )
        ),
    ]


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    work, threads = Workload(new_tokens=16 if quick else 64), cores()
    with tempfile.TemporaryDirectory() as directory:
        model = benchmark_model(Path(directory), SIZE)
        turns = alternate(peers(model, work, threads, quick), QUICK_ROUNDS if quick else ROUNDS, warmups=2, say=say)
    return results(turns, threads)


def results(turns: dict[str, Turns], threads: int) -> Results:
    rate = {name: t.median("tokens") / t.median("seconds") for name, t in turns.items()}
    rows = [
        {
            "name": name,
            "model": SIZE,
            "threads": threads,
            "tokens": int(t.median("tokens")),
            "seconds": t.median("seconds"),
            "tokens_per_second": rate[name],
            "turns": t.all("seconds"),
        }
        for name, t in turns.items()
    ]
    fastest_vllm = max(value for name, value in rate.items() if name.startswith("vllm"))
    ratios = {"vs_hf_generate": rate[OURS] / rate[HF], "vs_vllm": rate[OURS] / fastest_vllm}
    return Results("rollout", rows, ratios)


if __name__ == "__main__":
    run("rollout", measure)
