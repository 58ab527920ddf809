"""Throughput with RASD on, over plain decoding's, at batches from 1 to 64: guessing must never cost more than it wins.

The target, the draft and the store are the `rasd` benchmark's, and so are the tasks, mixed. As many requests begin at
once as the batch is large, and what is timed is from when all have their first token to when the last has ended: the
batch stays full. Every turn answers prompts that no turn before it did, one batch (small ones several times over).
Three peers take turns: plain, RASD, and plain again, which shows what the machine's noise alone does. All three answer
a batch before any answers the next, so that what is compared is seconds apart.

`worst_batch`: the least, over the batches, of the lower 95% bound of RASD's tokens per second over plain's (the mean of
the logarithms of the rounds' ratios, Student's t). The picture beside the JSON shows every batch's, with its bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import real_text, speculation_models
from benchmarks.harness import Peer, Turns, alternate
from benchmarks.models import cores
from benchmarks.rasd import MOST_NODES
from benchmarks.results import Results, run
from thornback.engine import ACTOR_ENVIRONMENT

SIZES, QUICK_SIZES = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16)
ROUNDS, WARMUPS = 21, 2  # of all batches
SETTLE = 0.05  # seconds between turns: none of the three has threads that go on spinning
NEW_TOKENS, LONGEST_PROMPT = 96, 256
TEMPERATURE = 0.7
# Student's t for 95% on one side, by the number of rounds.
_T = {2: 6.314, 11: 1.812, 13: 1.782, 21: 1.725}
PLAIN, AGAIN, RASD = "plain", "plain again", "rasd"


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    sizes, rounds = (QUICK_SIZES, 2) if quick else (SIZES, ROUNDS)
    settings = {
        "model": str(speculation_models.target(say)),
        "draft": str(speculation_models.draft(say)),
        "datastore": str(speculation_models.datastore(say)),
        "num_nodes": MOST_NODES,
        "adaptive": True,
        "threads": cores(),
        "prompts": prompts(),
        "sizes": list(sizes),
        "new_tokens": 32 if quick else NEW_TOKENS,
        "temperature": TEMPERATURE,
    }
    target = "benchmarks.peers.speculation:batches"
    peers = [
        Peer(name, target, {**settings, "source": RASD if name == RASD else PLAIN}, ACTOR_ENVIRONMENT)
        for name in (PLAIN, RASD, AGAIN)
    ]
    turns = alternate(peers, rounds * len(sizes), WARMUPS * len(sizes), say=say, settle=SETTLE)
    results = Results("rasd_batches")
    results.rows = [row(name, size, turns) for name in (RASD, AGAIN) for size in sizes]
    results.ratios = {
        "worst_batch": min(r["lower_95"] for r in results.rows if r["name"] == RASD),
        "worst_batch_plain_again": min(r["lower_95"] for r in results.rows if r["name"] == AGAIN),
    }
    results.plot = lambda path: draw(results.rows, path)
    return results


def prompts() -> list[list[int]]:
    """Held-out prompts of all tasks, in turn."""
    of_tasks = [[e.prompt for e in real_text.examples(task, True)] for task in real_text.TASKS]
    short = [[p for p in of_task if len(p) <= LONGEST_PROMPT] for of_task in of_tasks]
    return [list(prompt) for together in zip(*short, strict=False) for prompt in together]


def row(name: str, size: int, turns: dict[str, Turns]) -> dict[str, Any]:
    def rates(of: str) -> np.ndarray:
        return np.array(turns[of].all(f"tokens {size}")) / np.array(turns[of].all(f"seconds {size}"))

    logs = np.log(rates(name) / rates(PLAIN))
    half = _T[len(logs)] * logs.std(ddof=1) / np.sqrt(len(logs))
    return {
        "name": name,
        "batch": size,
        "threads": cores(),
        "tokens_per_second": float(np.median(rates(name))),
        "over_plain": float(np.exp(logs.mean())),
        "lower_95": float(np.exp(logs.mean() - half)),
        "upper_95": float(np.exp(logs.mean() + half)),
        "turns": np.exp(logs).tolist(),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Throughput over plain decoding's, by batch, with bounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(1, color="0.8", linewidth=1)
    for name, marker in ((RASD, "o"), (AGAIN, "s")):
        of = [r for r in rows if r["name"] == name]
        middle = np.array([r["over_plain"] for r in of])
        bounds = np.array([[r["over_plain"] - r["lower_95"], r["upper_95"] - r["over_plain"]] for r in of]).T
        axes.errorbar([r["batch"] for r in of], middle, bounds, marker=marker, capsize=3, label=name)
    axes.set_xscale("log", base=2)
    batches = sorted({r["batch"] for r in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch", ylabel="tokens/s over plain decoding's", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("rasd_batches", measure)
