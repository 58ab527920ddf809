"""Placement in a simulated cluster: the product's own `Placer` beside four ways that others have.

A replica computes up to 2,048 tokens a step: its samples' next tokens, and chunks of prompts with what is left. What
steps take is derived for a model of 8 billion parameters in bfloat16 from the cards' published arithmetic and memory
bandwidth, 60% and 75% of which are used (`CARDS`).

The conditions are fixed (`CONDITIONS`). Others instead: `--trace FILE` (Mooncake's format) or `--lengths mixed --rate
8`, on `--mix A100:4+A100:4` (cards and numbers that prefill, and that decode); `--measure MODEL` adds the card
`measured`: this machine, running that model's directory in thornback's engine. `--seed` goes with either.

A request counts as served within its objectives if its first token comes within `FIRST_TOKEN` seconds and the others
`PER_TOKEN` apart on average; goodput is how many do so a second. Of one that is refused the time until the end is taken
to be `REFUSED` seconds.

`latency_imbalance_vs_static`: mean seconds to the end over those of the better static split (least-loaded), where all
prompts are long; `goodput_bursts_vs_static`: goodput over its, in bursts; `goodput_vs_colocated`: over colocated
replicas', the geometric mean over the paper's settings; `worst_vs_best_alternative`: the least, over all conditions, of
goodput over the best alternative's and of the best alternative's mean time over ours. `decision_microseconds`: of one
placement among 1,000 replicas, the median.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, mean, median
from typing import Any

import numpy as np

from benchmarks.cluster import policies
from benchmarks.cluster.measured import measured
from benchmarks.cluster.simulation import Job, simulate
from benchmarks.cluster.traces import LENGTHS, Arrival, poisson, read_mooncake, shifting
from benchmarks.results import Results, run
from thornback.algorithms import Node, PlacementConfig, Placer, Role

FIRST_TOKEN, PER_TOKEN, REFUSED = 3.0, 0.05, 120.0
SECONDS, SEEDS = 180.0, (0, 1, 2)
CONFIG = PlacementConfig(first_token_seconds=FIRST_TOKEN, token_seconds=PER_TOKEN, refuses=True)
NAMES = (policies.OURS, policies.STATIC, policies.LEAST, policies.COLOCATED, policies.CONDITIONAL)
_FLOPS, _BYTES, _BYTES, _TOKEN_BYTES = (
    16e9,
    16e9,
    16e9,
    131_072,
)  # of a token; of a pass; of a token's keys and values


def _card(flops: float, bandwidth: float, memory: float) -> Node:
    """A replica on a processor of such arithmetic (bfloat16) and bytes a second, and bytes of memory."""
    return Node(
        "",
        prefill_rate=0.6 * flops / _FLOPS,
        step_seconds=_BYTES / (0.75 * bandwidth) + 0.001,
        sample_seconds=_FLOPS / (0.6 * flops),
        context_seconds=_TOKEN_BYTES / (0.75 * bandwidth),
        capacity=int((0.9 * memory - _BYTES) / _TOKEN_BYTES),
    )


CARDS = {
    "A100": _card(312e12, 2.0e12, 80e9),
    "L20": _card(119.5e12, 0.864e12, 48e9),
    "H20": _card(148e12, 4.0e12, 96e9),
}


def cluster(mix: str, machine: int = 8) -> list[Node]:
    """The replicas of a mix such as `L20:4+H20:4`: those that prefill, and those that decode, `machine` of them on each
    machine. Raises `ValueError` for what is none."""
    nodes: list[Node] = []
    for role, part in zip(Role, mix.split("+"), strict=True):
        card, _, count = part.partition(":")
        if card not in CARDS:
            raise ValueError(f"{mix}: there is no card {card!r}, but {', '.join(CARDS)}.")
        for number in range(len(nodes), len(nodes) + int(count)):
            name, of = f"{role.name.lower()}-{number}", f"machine-{number // machine}"
            nodes.append(replace(CARDS[card], node_id=name, machine=of, role=role))
    return nodes


@dataclass(frozen=True, slots=True)
class Condition:
    """A cluster and its requests, which follow from a seed."""

    nodes: Sequence[Node]
    trace: Callable[[int], list[Arrival]]


def _poisson(lengths: str, rate: float, bursts: float = 1.0) -> Callable[[int], list[Arrival]]:
    return lambda seed: poisson(lengths, rate, SECONDS, seed, bursts)


_FOUR_FOUR, _L20_H20 = cluster("A100:4+A100:4"), cluster("L20:4+H20:4")
CONDITIONS = {
    "balanced": Condition(_FOUR_FOUR, _poisson("mixed", 8.0)),
    "imbalance": Condition(_FOUR_FOUR, _poisson("longbench", 6.0)),
    "imbalance, answers": Condition(_FOUR_FOUR, _poisson("chat", 60.0)),
    "bursts": Condition(_FOUR_FOUR, _poisson("mixed", 9.0, bursts=5.0)),
    "shifting": Condition(_FOUR_FOUR, lambda seed: shifting({"longbench": 5.0, "chat": 50.0}, SECONDS, 30.0, seed)),
    "light": Condition(_FOUR_FOUR, _poisson("mixed", 2.0)),
    "paper: A100": Condition(_FOUR_FOUR, _poisson("longbench", 8.0)),
    "paper: L20 and H20": Condition(_L20_H20, _poisson("longbench", 3.5)),
    "L20 and H20, light": Condition(_L20_H20, _poisson("longbench", 1.5)),
    "64 replicas": Condition(cluster("A100:32+A100:32"), _poisson("mixed", 64.0)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, action="append", metavar="N", help="of the requests; may come repeatedly")
    parser.add_argument("--trace", metavar="FILE", help="requests, as JSON lines in Mooncake's format")
    parser.add_argument("--lengths", choices=LENGTHS, help="instead of a trace: of prompts and answers")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--mix", default="A100:4+A100:4", help="cards, and how many prefill and how many decode")
    parser.add_argument("--measure", metavar="MODEL", help="a model directory, for the card `measured`")


def measure(
    quick: bool,
    say: Callable[[str], None],
    seed: list[int] | None = None,
    trace: str | None = None,
    lengths: str | None = None,
    rate: float = 4.0,
    mix: str = "",
    measure: str | None = None,
) -> Results:
    results = Results("cluster_sim")
    if measure is not None:
        say("measuring")
        CARDS["measured"] = measured(measure)
    seeds = seed or (SEEDS[:1] if quick else SEEDS)
    conditions: dict[str, Condition] = CONDITIONS
    if trace is not None:
        arrivals = read_mooncake(trace)
        conditions = {f"{Path(trace).name} on {mix}": Condition(cluster(mix), lambda _: arrivals)}
    elif lengths is not None or measure is not None:
        given = _poisson(lengths or "mixed", rate)
        conditions = {f"{lengths or 'mixed'}, {rate:g} a second, on {mix}": Condition(cluster(mix), given)}
    for name, condition in conditions.items():
        if not quick or len(condition.nodes) <= 8:
            say(name)
            results.rows += [row(name, policy, condition, seeds) for policy in NAMES]
    results.ratios = ratios(results.rows) | {"decision_microseconds": decision_microseconds(1000)}
    results.plot = lambda path: draw(results.rows, path)
    return results


def row(name: str, policy: str, condition: Condition, seeds: Sequence[int]) -> dict[str, Any]:
    """What came of a condition under a policy, over all seeds."""
    jobs: list[Job] = []
    for seed in seeds:
        made = policies.make(policy, condition.nodes, CONFIG)
        trace = condition.trace(seed)
        jobs += simulate(trace, condition.nodes, made, CONFIG.transfer_seconds, CONFIG.transfer_rate)
    served = [job for job in jobs if job.placed is not None]
    firsts = [job.first_token - job.arrival.time for job in served]
    good = [first <= FIRST_TOKEN and job.time_per_token <= PER_TOKEN for job, first in zip(served, firsts, strict=True)]
    times = [job.end - job.arrival.time for job in served]
    return {
        "name": name,
        "policy": policy,
        "requests": len(jobs),
        "refused": len(jobs) - len(served),
        "goodput": sum(good) / (SECONDS * len(seeds)),
        "mean_seconds": mean([*times, *[REFUSED] * (len(jobs) - len(served))]),
        "p90_first_token": float(np.quantile(firsts, 0.9)),
        "p90_per_token": float(np.quantile([job.time_per_token for job in served], 0.9)),
    }


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    by_name = {(r["name"], r["policy"]): r for r in rows}
    names = list(dict.fromkeys(r["name"] for r in rows))

    def over(name: str, other: str, what: str) -> float:
        return by_name[name, policies.OURS][what] / by_name[name, other][what]

    others = [policy for policy in NAMES if policy != policies.OURS]
    goodput = {name: min(over(name, other, "goodput") for other in others) for name in names}
    latency = {name: min(1 / over(name, other, "mean_seconds") for other in others) for name in names}
    found = {"worst_vs_best_alternative": min(*goodput.values(), *latency.values())}
    if not set(CONDITIONS) & set(names):
        return found
    papers = [name for name in names if name.startswith("paper")]
    return {
        "latency_imbalance_vs_static": over("imbalance", policies.LEAST, "mean_seconds"),
        "goodput_bursts_vs_static": over("bursts", policies.LEAST, "goodput"),
        "goodput_vs_colocated": geometric_mean(over(name, policies.COLOCATED, "goodput") for name in papers),
        **found,
    }


def decision_microseconds(num_nodes: int) -> float:
    """Of a busy cluster, half of each role, 8 to a machine."""
    placer = Placer(CONFIG)
    for node in cluster(f"A100:{num_nodes // 2}+A100:{num_nodes - num_nodes // 2}"):
        placer.add(node)
    rng, taken = np.random.default_rng(0), []
    for number in range(3000):
        num_tokens = int(rng.integers(16, 8000))
        started = time.perf_counter()
        placer.place(number * 0.001, num_tokens)
        taken.append(time.perf_counter() - started)
    return 1e6 * median(taken[1000:])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Goodput and mean time to the end over the better static split's, by condition."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["name"] for r in rows))
    by_name = {(r["name"], r["policy"]): r for r in rows}
    places = np.arange(len(names))[::-1]
    figure = Figure(figsize=(9.6, 0.8 + 0.42 * (len(names) + 2)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, what, title in (
        (left, "goodput", "goodput: right is better"),
        (right, "mean_seconds", "mean time to the end: left is better"),
    ):
        axes.hlines(places, 0.01, 100, color="0.92", linewidth=1, zorder=0)
        axes.axvline(1, color="0.6", linewidth=1, zorder=0)
        for i, policy in enumerate(NAMES[::-1]):
            values = [by_name[n, policy][what] / by_name[n, policies.LEAST][what] for n in names]
            ours = policy == policies.OURS
            look = {"marker": "D", "color": "black", "s": 46} if ours else {"marker": "o", "color": f"C{i}", "s": 34}
            axes.scatter(values, places, label=policy, alpha=1 if ours else 0.75, linewidths=0, **look)
        spread = [by_name[n, p][what] / by_name[n, policies.LEAST][what] for n in names for p in NAMES]
        axes.set(
            title=title, xlabel=f"over {policies.LEAST}", xscale="log", xlim=(min(spread) / 1.3, max(spread) * 1.3)
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
    left.set_yticks(places, names)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES), frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("cluster_sim", measure, add_options)
