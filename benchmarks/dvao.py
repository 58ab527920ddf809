"""Do DVAO's advantages give a better Pareto front than combined rewards or advantages (arXiv 2605.25604, papers.md)?

On three tasks, each with two rewards (on two of them at odds: right answers cost tokens, or searches), models that are
warmed up once per task and seed are trained in groups of 16, the paper's, by reward combination, advantage combination,
GDPO, DVAO, and anchored DVAO (ours), at w1 in {.1, .5, .9}; and on either reward alone by GRPO. All methods share
models, prompts, seeds and number of steps, so that seeds are pairs. Each has the learning rate of the task's that
served it best at equal weights, on seeds of their own (the product of both rewards).

A run is the point of its two rewards on held-out prompts, sampled at temperature 1 after the last step. A method's
front is that of its three points; `hypervolume` is the area that it dominates above (0, 0). For each task the baseline
is that of reward combination, advantage combination and GDPO whose mean hypervolume is largest;
`hypervolume_vs_best_baseline` is the mean over tasks of DVAO's over that one's. Rows with `difference` give the paired
differences with their 95% intervals (Student's t).

Beside it, of each method, over all steps: the mean square and the largest size of advantages, the share of steps whose
gradient norm is above three times the run's median, and the curves of both rewards (in the picture).

Controls: `noise`, a reward that is a coin flip, as a third one, under DVAO with and without a cap of its weight; and
groups of four.

What comes of each run is kept in docs/results/runs/dvao.jsonl (of a quick one, in the user's cache): a second call goes
on where the first was stopped, and with all runs there it only reports. Remove the file to make them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.experiment_tasks import QUICK_STEPS, TASKS, rates_of, recipe, start
from benchmarks.experiments import (
    Experiment,
    Outcomes,
    WarmUp,
    hypervolume,
    interval,
    outcomes_of,
    over,
    run_grid,
    series,
    tuned,
)
from benchmarks.results import Results, run
from thornback.contracts import Completion

BASELINES = ("reward_combination", "advantage_combination", "gdpo")
METHODS = (*BASELINES, "dvao", "anchored_dvao")
WEIGHTS = (0.1, 0.5, 0.9)
SEEDS = 8
STEPS = 60  # in which each prompt is met once
OUR_REWARDS = {name: {"function": f"benchmarks.dvao:{name}"} for name in ("frugality", "noise")}
SAMPLES = 16  # rollouts a prompt


def frugality(completion: Completion) -> float:
    """1 for no search, 0 for four and more: each costs the same, whether it was needed or not."""
    return max(0.0, 1.0 - completion.num_calls / 4)


def noise(completion: Completion) -> float:
    """A coin flip, the same for the same text."""
    return float(hash_of(completion.prompt.key + completion.text) % 2)


def hash_of(text: str) -> int:
    """The same in every process."""
    return sum(i * ord(c) for i, c in enumerate(text, start=1)) // 7


def experiment(
    labels: dict[str, Any], model: WarmUp, steps: int, learning_rate: float, samples: int = SAMPLES, **sections: Any
) -> Experiment:
    """A run of `labels`' task and seed, from `model`; `sections` of a recipe tell how it learns."""
    how = recipe(labels["task"], labels["seed"], steps, learning_rate, samples, evaluations=3, **sections)
    return Experiment({**labels, "learning_rate": learning_rate}, how, model)


def learns(task: str, method: str, w1: float) -> dict[str, Any]:
    """A recipe's sections that make the method, on the task's two rewards."""
    anchors = {"anchors": {"drop_solved": False, "drop_unsolved": False, "num_rollouts": 4}}
    return {
        "rewards": weighted(task, w1),
        # Of rewards combined, one of which has no weight, GRPO on the other remains.
        "algorithm": {"estimator": "reward_combination" if method == "grpo" else method},
        **(anchors if method == "anchored_dvao" else {}),
    }


def weighted(task: str, w1: float) -> dict[str, dict[str, Any]]:
    """A recipe's section on the task's two rewards."""
    weights = zip(TASKS[task]["rewards"], (w1, 1.0 - w1), strict=True)
    return {name: {"weight": weight, **OUR_REWARDS.get(name, {})} for name, weight in weights}


def learning_rates(outcomes: Outcomes, say: Callable[[str], None]) -> dict[tuple[str, str], float]:
    """By task and method, from runs at equal weights on seeds of their own."""

    def run(task: str, method: str, seed: int, rate: float) -> Experiment:
        labels = {"task": task, "method": method, "seed": seed}
        return experiment(labels, start(task, seed, False), STEPS, rate, **learns(task, method, 0.5))

    def score(outcome: Mapping[str, Any]) -> float:
        return math.prod(point(outcome["task"], outcome))

    return tuned(outcomes, rates_of(TASKS), METHODS, run, score, say)


def experiments(rates: Mapping[tuple[str, str], float], quick: bool) -> list[Experiment]:
    """The whole grid, with learning rates by task and method."""
    seeds, steps = (range(2), QUICK_STEPS) if quick else (range(SEEDS), STEPS)
    grid = []
    for task in TASKS:
        for seed in seeds:
            model = start(task, seed, quick)

            def add(method: str, w1: float, control: str = "", samples: int = SAMPLES, sections: Any = None) -> None:
                labels = {"task": task, "method": method, "w1": w1, "seed": seed, "control": control}  # noqa: B023
                rate = rates[task, "reward_combination" if method == "grpo" else method]  # noqa: B023
                how = learns(task, method, w1) | (sections or {})  # noqa: B023
                grid.append(experiment(labels, model, steps, rate, samples, **how))  # noqa: B023

            for w1 in (0.5,) if quick else WEIGHTS:
                for method in METHODS:
                    add(method, w1)
            for w1 in (0.0, 1.0):
                add("grpo", w1)
            noisy = {"rewards": {**weighted(task, 0.5), "noise": {"weight": 0.5, **OUR_REWARDS["noise"]}}}
            for method in ("reward_combination", "dvao"):
                add(method, 0.5, "noise", sections=noisy)
                add(method, 0.5, "groups of 4", samples=4)
            capped = {"algorithm": {"estimator": "dvao", "dvao": {"weight_cap": 0.4}}}
            add("dvao", 0.5, "noise, weights capped at 0.4", sections=noisy | capped)
    return grid


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    there = outcomes_of("dvao", quick)
    rates = dict.fromkeys(product(TASKS, METHODS), 2e-4) if quick else learning_rates(there, say)
    outcomes = run_grid(experiments(rates, quick), there, say)
    results = Results("dvao")
    gains = []
    for task in TASKS:
        of_task = [o for o in outcomes if o["task"] == task]
        results.rows += [row(task, of_task, method) for method in (*METHODS, "grpo")]
        volumes = {method: front_volumes(task, of_task, method) for method in METHODS}
        best = max(BASELINES, key=lambda method: mean(volumes[method].values()))
        gains.append(over(mean(volumes["dvao"].values()), mean(volumes[best].values())))
        results.rows += [
            difference(task, method, other, volumes)
            for method in ("dvao", "anchored_dvao")
            for other in (*BASELINES, *(("dvao",) if method != "dvao" else ()))
        ]
        results.rows += controls(task, of_task)
    results.ratios = {"hypervolume_vs_best_baseline": mean(gains)}
    results.plot = lambda path: draw(outcomes, path)
    return results


def point(task: str, outcome: Mapping[str, Any]) -> tuple[float, float]:
    last = outcome["evaluations"][-1]
    first, second = (last[f"reward/{name}"] for name in TASKS[task]["rewards"])
    return first, second


def plain(outcomes: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [o for o in outcomes if o["method"] == method and not o["control"]]


def front_volumes(task: str, outcomes: list[dict[str, Any]], method: str) -> dict[int, float]:
    """By seed."""
    of = plain(outcomes, method)
    return {
        seed: hypervolume(np.array([point(task, o) for o in of if o["seed"] == seed]))
        for seed in sorted({o["seed"] for o in of})
    }


def row(task: str, outcomes: list[dict[str, Any]], method: str) -> dict[str, Any]:
    of = plain(outcomes, method)
    volumes = list(front_volumes(task, outcomes, method).values())
    found = {"name": method, "task": task, "hypervolume": mean(volumes), "runs": len(of)}
    found["learning_rate"] = of[0]["learning_rate"]
    for w1 in sorted({o["w1"] for o in of}):
        points = np.array([point(task, o) for o in of if o["w1"] == w1])
        found[f"w1={w1}"] = ", ".join(f"{value:.3f}" for value in points.mean(0))
    return found | {
        "mean_square": float(np.mean([series(o, "advantage/mean_square") for o in of])),
        "largest": float(np.max([series(o, "advantage/abs_max") for o in of])),
        "grad_norm_spikes": mean(map(spikes, of)),
    }


def spikes(outcome: dict[str, Any]) -> float:
    """The share of steps whose gradient is more than three times as large as the run's median; where there was nothing
    to learn it is 0."""
    norms = series(outcome, "grad_norm")
    return float((norms > 3 * np.median(norms)).mean())


def difference(task: str, method: str, other: str, volumes: dict[str, dict[int, float]]) -> dict[str, Any]:
    middle, low, high = interval([volumes[method][seed] - volumes[other][seed] for seed in volumes[method]])
    return {
        "name": f"{method} - {other}",
        "task": task,
        "difference": middle,
        "lower_95": low,
        "upper_95": high,
        "seeds": len(volumes[method]),
    }


def controls(task: str, outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for control, method in dict.fromkeys((o["control"], o["method"]) for o in outcomes if o["control"]):
        of = [o for o in outcomes if (o["control"], o["method"]) == (control, method)]
        first, second = np.array([point(task, o) for o in of]).mean(0)
        rows.append(
            {
                "name": f"{method}, {control}",
                "task": task,
                "first_reward": float(first),
                "second_reward": float(second),
                "weight_of_noise": float(np.mean([series(o, "weight/noise") for o in of])),
            }
        )
    return rows


def draw(outcomes: list[dict[str, Any]], path: Path) -> None:
    """Fronts above; below, over the steps, the first reward at equal weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, len(TASKS), squeeze=False)
    colours = dict(zip(METHODS, ("#4c78a8", "#72b7b2", "#b279a2", "black", "#e45756"), strict=True))
    for column, (task, of) in enumerate(TASKS.items()):
        first, second = of["rewards"]
        fronts, curves = axes[:, column]
        for method in METHODS:
            runs = [o for o in plain(outcomes, method) if o["task"] == task]
            weights = sorted({o["w1"] for o in runs})
            points = np.array([np.mean([point(task, o) for o in runs if o["w1"] == w], 0) for w in weights])
            fronts.plot(*points.T, marker="o", color=colours[method], label=method.replace("_", " "), linewidth=1)
            middle = [o for o in runs if o["w1"] == 0.5]
            shown = [o["evaluations"] for o in middle]
            curve = np.mean([[e[f"reward/{first}"] for e in evaluations] for evaluations in shown], 0)
            curves.plot([e["step"] for e in shown[0]], curve, color=colours[method], linewidth=1)
        fronts.set(title=task, xlabel=first, ylabel=second)
        curves.set(xlabel="step", ylabel=f"{first}, held out, w1 = 0.5")
    axes[0, 0].legend(frameon=False, fontsize=8)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("dvao", measure)
