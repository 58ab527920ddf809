"""One whole training step: rollouts, two rewards, update, weight sync; against TRL's GRPOTrainer.

8 prompts x 8 completions of 64 tokens, Qwen3 with 2,048 tokens of vocabulary, float32, no KL, one epoch, one
optimizer step; every phase of both may use all cores. thornback runs as many rollout workers, and then learner ranks,
as there are cores, with one thread each: the phases alternate, so no core has two of them at work.

`vs_trl_small` (0.1M parameters) and `vs_trl` (3.7M): our tokens per second over TRL's. `of_arithmetic_limit`: the
operations that a step of the larger model cannot do without, per second, over what this machine reaches in nothing
but matrix products of this model's sizes, the fastest way that we know of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arithmetic import Arithmetic
from benchmarks.harness import QUICK_ROUNDS, ROUNDS, Peer, Turns, alternate
from benchmarks.models import benchmark_model, cores
from benchmarks.results import Results, run

OURS, TRL, PRODUCTS = "thornback", "trl GRPOTrainer", "matrix products"
SIZES = {"vs_trl_small": "0.1M", "vs_trl": "3.7M"}
PROMPT_TOKENS = 26  # of benchmarks.problems, rendered; the test suite holds it to that
PLAIN = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}


def peers(model: str, directory: str, batch: dict[str, int], threads: int) -> list[Peer]:
    settings: dict[str, Any] = {"model": model, **batch}
    arithmetic = Arithmetic.of(model)
    rows = batch["prompts"] * batch["samples"]
    plain = {**PLAIN, "OMP_NUM_THREADS": str(threads)}
    return [
        Peer(
            OURS,
            "benchmarks.peers.thornback_step:step",
            {**settings, "directory": f"{directory}/run", "processes": threads, "threads": 1},
        ),
        Peer(
            TRL,
            "benchmarks.peers.trl_grpo:step",
            {**settings, "directory": f"{directory}/trl", "threads": threads},
            plain,
        ),
        Peer(
            PRODUCTS,
            "benchmarks.arithmetic:rate",
            {"products": arithmetic.products, "rows": rows, "threads": threads},
            plain,
        ),
    ]


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    results = Results("rl_step")
    for ratio, size in SIZES.items():
        say(f"the model of {size} parameters")
        share = measure_model(results, ratio, size, quick, say)
    results.ratios["of_arithmetic_limit"] = share  # the last and largest model's
    return results


def measure_model(results: Results, ratio: str, size: str, quick: bool, say: Callable[[str], None]) -> float:
    """Add one model's rows and ratio; returns which share of the arithmetic limit our step reaches."""
    threads, rounds = cores(), QUICK_ROUNDS if quick else ROUNDS
    batch = {"prompts": 8, "samples": 8, "new_tokens": 16 if quick else 64}
    with tempfile.TemporaryDirectory() as directory:
        model = benchmark_model(Path(directory), size)
        needed = Arithmetic.of(model).step(prompt_tokens=PROMPT_TOKENS, **batch)
        turns = alternate(peers(model, directory, batch, threads), rounds, warmups=2, say=say)
    rates = {name: turns[name].median("tokens") / turns[name].median("seconds") for name in (OURS, TRL)}
    results.rows += [step_row(turns[name], size, threads, rate) for name, rate in rates.items()]
    results.ratios[ratio] = rates[OURS] / rates[TRL]
    limit = turns[PRODUCTS]
    fastest = max(max(limit.all("mm")), max(limit.all("onednn")))
    share = needed / turns[OURS].median("seconds") / fastest
    results.rows.append(
        {
            "name": PRODUCTS,
            "model": size,
            "threads": threads,
            "mm_gflops": max(limit.all("mm")) / 1e9,
            "onednn_gflops": max(limit.all("onednn")) / 1e9,
            "step_gflop": needed / 1e9,
            "of_arithmetic_limit": share,
        }
    )
    return share


def step_row(turns: Turns, size: str, threads: int, rate: float) -> dict[str, Any]:
    """A trainer's medians; of ours also by phase."""
    prefix = "phase/"
    phases = {key.removeprefix(prefix): turns.median(key) for key in turns.values[0] if key.startswith(prefix)}
    return {
        "name": turns.peer.name,
        "model": size,
        "threads": threads,
        "tokens": int(turns.median("tokens")),
        "seconds": turns.median("seconds"),
        "tokens_per_second": rate,
        **({"phases": phases} if phases else {}),
        "turns": turns.all("seconds"),
    }


if __name__ == "__main__":
    run("rl_step", measure)
