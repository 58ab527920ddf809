"""What it takes to move a request's keys and values: FlowKV's way, and those before it, over the same transports.

The shape is that of a model of 8 billion parameters in bfloat16 (32 layers, 8 heads of 128: 4 MiB for a block of 32
tokens). Two pools, one process each. Requests of 500 to 10,000 tokens lie in pools that 1,000 requests of log-uniform
lengths have gone through (10,000 where calls are only counted), of which 90% is in use.

The ways, each as the paper's ablations have it: `blockwise`: a call for every block of every layer's keys, and values;
`layerwise`: gathered and scattered, a call for each of those; `merged`: gathered into one buffer, a call, scattered;
`layout`: blocks outermost, a call for each; `allocator`: and in segments on either side, of which the sender's are
called for and scattered; `alignment`: runs that are contiguous on both sides, pool to pool: the product's own code.

`calls_after_churn`: calls a request, the mean; `..._growth`: while answers grow on the receiving side; `..._sharing`:
where half of the requests begin with one of eight prefixes of 1,024 tokens that the sender has cached;
`calls_vs_freelist`: over those of a queue of free blocks, as vLLM has; `calls_fresh`: the most, in pools that were
empty. `vs_memcpy`: seconds over shared memory, over those of one copy of as many bytes. `vs_blockwise`: over gloo,
where a call is a message, over the blockwise way's (`..._ipc`: where it is a copy); `vs_one_message`: over one's.
`object_store_vs_memcpy`: out of a pool, through Ray's object store, into a pool, over one copy between the pools of
shared memory. All of these are geometric means over the lengths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

from benchmarks.models import cores
from benchmarks.peers import kv_ways
from benchmarks.peers.kv_churn import FreeList, churned, mean_calls
from benchmarks.results import Results, run
from thornback.algorithms import SegmentAllocator, align_runs

TOKENS, QUICK_TOKENS = (500, 1000, 2000, 4000, 8000, 10_000), (500, 2000)
NUM_BLOCKS = 640  # of each pool in which bytes are moved: 2.5 GiB
CHURN_BLOCKS, CHURN = 16_384, 10_000  # of pools that are only counted, and requests that go through them
ROUNDS, QUICK_ROUNDS = 7, 2


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    tokens, rounds = (QUICK_TOKENS, QUICK_ROUNDS) if quick else (TOKENS, ROUNDS)
    results = Results("kv_transfer")
    say("calls after churn")
    results.ratios |= calls(1000 if quick else CHURN, results.rows)
    places = {n: place_of(n) for n in tokens}
    for transport, pair in kv_ways.TRANSPORTS.items():
        say(transport)
        with pair(NUM_BLOCKS) as (ways, _):
            for num_tokens, (source, target) in places.items():
                results.rows += timed(transport, num_tokens, ways, source, target, rounds)
    results.ratios |= ratios(results.rows, tokens)
    results.plot = lambda path: draw(results.rows, path)
    return results


def calls(churn: int, rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many calls a request takes, with either allocator."""
    found = {}
    for name, make in (("segments", SegmentAllocator), ("free list", FreeList)):
        for growth, sharing in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.5)):
            mean, most = mean_calls(make, CHURN_BLOCKS, churn, growth, sharing)
            found[name, growth, sharing] = mean
            row = {"name": f"calls, {name}", "growth": growth, "sharing": sharing, "calls": mean, "most_calls": most}
            rows.append(row)
    fresh = [SegmentAllocator(CHURN_BLOCKS), SegmentAllocator(CHURN_BLOCKS)]
    return {
        "calls_fresh": max(len(align_runs(*(a.allocate(blocks_of(n)) for a in fresh))) for n in TOKENS),
        "calls_after_churn": found["segments", 0.0, 0.0],
        "calls_after_churn_growth": found["segments", 0.05, 0.0],
        "calls_after_churn_sharing": found["segments", 0.0, 0.5],
        "calls_vs_freelist": found["segments", 0.0, 0.0] / found["free list", 0.0, 0.0],
    }


def blocks_of(num_tokens: int) -> int:
    return -(-num_tokens // kv_ways.BLOCK_SIZE)


def place_of(num_tokens: int) -> tuple[list[int], list[int]]:
    """Blocks of a request on both sides, in pools that many have gone through."""
    sides = []
    for seed in (0, 1):
        side = churned(SegmentAllocator, NUM_BLOCKS, CHURN // 10, seed)
        side.make_room(blocks_of(num_tokens))
        sides.append(side.allocator.allocate(blocks_of(num_tokens)))
    return sides[0], sides[1]


def timed(
    transport: str, num_tokens: int, ways: dict[str, kv_ways.Way], source: list[int], target: list[int], rounds: int
) -> list[dict[str, Any]]:
    """All ways in turn, round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    counts = {name: way(source, target) for name, way in ways.items()}  # and what is used first is used
    names, rng = list(ways), np.random.default_rng(num_tokens)
    for _ in range(rounds):
        for name in rng.permutation(names).tolist():  # whom a way comes after makes a difference
            started = time.perf_counter()
            ways[name](source, target)
            seconds[name].append(time.perf_counter() - started)
    num_bytes = len(source) * kv_ways.BLOCK_BYTES
    return [
        {
            "name": name,
            "transport": transport,
            "tokens": num_tokens,
            "threads": cores(),
            "calls": counts[name],
            "seconds": median(seconds[name]),
            "gib_per_second": num_bytes / median(seconds[name]) / 2**30,
            "turns": seconds[name],
        }
        for name in names
    ]


def ratios(rows: list[dict[str, Any]], tokens: tuple[int, ...]) -> dict[str, float]:
    seconds = {(r["transport"], r["name"], r["tokens"]): r["seconds"] for r in rows if "transport" in r}

    def over(transport: str, way: str, other: str, its: str = "") -> float:
        return geometric_mean(seconds[transport, way, n] / seconds[its or transport, other, n] for n in tokens)

    return {
        "vs_memcpy": over("ipc", "alignment", "memcpy"),
        "vs_blockwise": over("gloo", "alignment", "blockwise"),
        "vs_blockwise_ipc": over("ipc", "alignment", "blockwise"),
        "vs_one_message": over("gloo", "alignment", "one message"),
        "object_store_vs_memcpy": over("object store", "alignment", "memcpy", "ipc"),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds by length, a panel for each transport."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = figure.subplots(1, len(kv_ways.TRANSPORTS), sharey=True)
    for axes, transport in zip(panels, kv_ways.TRANSPORTS, strict=True):
        of = [row for row in rows if row.get("transport") == transport]
        for name in dict.fromkeys(row["name"] for row in of):
            line = [row for row in of if row["name"] == name]
            ours = {"color": "black", "linewidth": 2} if name == "alignment" else {"linewidth": 1}
            axes.plot([r["tokens"] for r in line], [r["seconds"] for r in line], marker=".", label=name, **ours)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [500, 1000, 2000, 4000, 10_000]
        axes.set_xticks(ticks, [f"{t / 1000:g}k" for t in ticks])
        axes.minorticks_off()
        axes.set(title=transport, xlabel="tokens")
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="seconds")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("kv_transfer", measure)
