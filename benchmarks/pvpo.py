"""Does PVPO reach GRPO's accuracy with fewer rollouts (arXiv 2508.21104, papers.md)?

On `multihop` and `arithmetic`, each with one reward, models that are warmed up once per task and seed are trained by
GRPO and by PVPO with N in {2, 3, 5, 8} rollouts a prompt, all with the same prompts, seeds and steps, so that seeds are
pairs. Each has the learning rate of three that served it best at N = 5 on seeds of their own. PVPO's anchors and
filter come from 5 rollouts of the starting model on each prompt, which count.

Beside them, at N = 5, what a fair comparison needs: GRPO with the same filter; GRPO with the filter and with cached
right answers of a model that was warmed up for longer; PVPO with those; and the mean of a prompt's own rewards so far
in place of the anchor, which costs nothing before.

`pvpo2_vs_grpo5`: accuracy on held-out prompts, sampled at temperature 1 after the last step, of PVPO at N = 2 over
GRPO's at N = 5, the lower of the two tasks; `rollout_cost`: the rollouts of the one, pre-sampling included, over those
of the other, the higher of the two. Rows with `difference` give paired differences with their 95% intervals (Student's
t). The picture shows accuracy against rollouts.

What comes of each run is kept in docs/results/runs/pvpo.jsonl (of a quick one, in the user's cache): a second call goes
on where the first was stopped, and with all runs there it only reports. Remove the file to make them again.
"""

from __future__ import annotations

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
    interval,
    outcomes_of,
    over,
    run_grid,
    series,
    tuned,
)
from benchmarks.results import Results, run

SIZES = (2, 3, 5, 8)
SEEDS = 16
PROMPTS, STEPS = 96, 144  # twelve epochs
ANCHORS = {"num_rollouts": 5}
REWARDS = {"multihop": "answer", "arithmetic": "correct"}
LONGER = 2  # times the warm-up of the larger model's part
METHODS = ("grpo", "pvpo", "grpo, filter", "grpo, filter, cached answers", "pvpo, cached answers", "running baseline")
GRPO, PVPO, FILTER, CACHED, PVPO_CACHED, RUNNING = METHODS


def experiment(
    labels: dict[str, Any], models: tuple[WarmUp, WarmUp], learning_rate: float, quick: bool = False
) -> Experiment:
    """A run of `labels`' task, method, n and seed, from `models`: see `starts`."""
    (model, larger), task, method = models, labels["task"], labels["method"]
    of = TASKS[task]["task"]
    sections: dict[str, Any] = {
        # A few of the prompts that the model was warmed up on: by so few alone they would be known by heart.
        "task": {**of, "options": {**of["options"], "num_train": PROMPTS}},
        "rewards": {REWARDS[task]: {}},
        "algorithm": {"estimator": "grpo" if method in (GRPO, FILTER, CACHED) else "pvpo"},
        "anchors": _anchors(method, larger.model, quick),
    }
    steps = QUICK_STEPS if quick else STEPS
    how = recipe(task, labels["seed"], steps, learning_rate, labels["n"], evaluations=6, **sections)
    with_larger = larger if method in (CACHED, PVPO_CACHED) else None
    return Experiment({**labels, "learning_rate": learning_rate}, how, model, with_larger, method == RUNNING)


def _anchors(method: str, larger: str, quick: bool) -> dict[str, Any] | None:
    if method == GRPO:
        return None
    if method == RUNNING:
        return {}  # its estimator asks for some, and gets others
    # After a quick warm-up hardly any prompt is ever solved, and the filter would leave none.
    keep = {"drop_solved": False, "drop_unsolved": False} if quick else {}
    return {**ANCHORS, **keep, **({"larger_model": larger} if method in (CACHED, PVPO_CACHED) else {})}


def learning_rates(outcomes: Outcomes, say: Callable[[str], None]) -> dict[tuple[str, str], float]:
    """By task and method, from runs at N = 5 on seeds of their own."""

    def run(task: str, method: str, seed: int, rate: float) -> Experiment:
        return experiment({"task": task, "method": method, "n": 5, "seed": seed}, starts(task, seed), rate)

    return tuned(outcomes, rates_of(REWARDS), METHODS, run, accuracy, say)


def starts(task: str, seed: int, quick: bool = False) -> tuple[WarmUp, WarmUp]:
    """The model that is trained, and the larger one, which is the same for all seeds."""
    return start(task, seed, quick), start(task, 0, quick, LONGER)


def experiments(rates: Mapping[tuple[str, str], float], quick: bool) -> list[Experiment]:
    """The whole grid, with learning rates by task and method."""
    grid = []
    for task in REWARDS:
        for seed in range(2) if quick else range(SEEDS):
            for method in METHODS:
                for n in SIZES if method in (GRPO, PVPO) else (5,):
                    labels = {"task": task, "method": method, "n": n, "seed": seed}
                    grid.append(experiment(labels, starts(task, seed, quick), rates[task, method], quick))
    return grid


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    there = outcomes_of("pvpo", quick)
    rates = dict.fromkeys(product(REWARDS, METHODS), 2e-4) if quick else learning_rates(there, say)
    outcomes = run_grid(experiments(rates, quick), there, say)
    results = Results("pvpo")
    reached, cost = [], []
    for task in REWARDS:
        of_task = [o for o in outcomes if o["task"] == task]
        kinds = list(dict.fromkeys((o["method"], o["n"]) for o in of_task))
        by_kind = {kind: [o for o in of_task if (o["method"], o["n"]) == kind] for kind in kinds}
        results.rows += [row(task, *kind, by_kind[kind]) for kind in kinds]
        for one, other in (((PVPO, 2), (GRPO, 5)), ((PVPO, 5), (GRPO, 5)), ((PVPO, 5), (FILTER, 5))):
            results.rows.append(difference(task, one, other, by_kind))
        few, many = by_kind[PVPO, 2], by_kind[GRPO, 5]
        reached.append(over(mean(map(accuracy, few)), mean(map(accuracy, many))))
        cost.append(mean(map(rollouts, few)) / mean(map(rollouts, many)))
    results.ratios = {"pvpo2_vs_grpo5": min(reached), "rollout_cost": max(cost)}
    results.plot = lambda path: draw(outcomes, path)
    return results


def accuracy(outcome: Mapping[str, Any]) -> float:
    return outcome["evaluations"][-1]["accuracy"]


def rollouts(outcome: dict[str, Any]) -> int:
    return outcome["num_rollouts"] + outcome["num_reference_rollouts"]


def row(task: str, method: str, n: int, of: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": method,
        "task": task,
        "n": n,
        "learning_rate": of[0]["learning_rate"],
        "accuracy_before": mean(o["evaluations"][0]["accuracy"] for o in of),
        "accuracy": mean(map(accuracy, of)),
        "rollouts": mean(map(rollouts, of)),
        "prompts": mean(o["num_prompts"] for o in of),
        "tool_calls": float(np.mean([series(o, "tool_calls") for o in of])),
        "seconds": mean(o["seconds"] for o in of),
    }


def difference(task: str, one: tuple[str, int], other: tuple[str, int], by_kind: dict) -> dict[str, Any]:
    pairs = zip(by_kind[one], by_kind[other], strict=True)
    middle, low, high = interval([accuracy(a) - accuracy(b) for a, b in pairs])
    return {
        "name": f"{one[0]} N={one[1]} - {other[0]} N={other[1]}",
        "task": task,
        "difference": middle,
        "lower_95": low,
        "upper_95": high,
        "seeds": len(by_kind[one]),
    }


def draw(outcomes: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against rollouts, pre-sampling included, as training goes on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    shown = {
        (GRPO, 2): "#9ecae9",
        (GRPO, 5): "#4c78a8",
        (FILTER, 5): "#b279a2",
        (PVPO, 2): "#555555",
        (PVPO, 5): "black",
    }
    for axes, task in zip(figure.subplots(1, len(REWARDS)), REWARDS, strict=True):
        for (method, n), colour in shown.items():
            of = [o for o in outcomes if (o["task"], o["method"], o["n"]) == (task, method, n)]
            steps = np.array([e["step"] for e in of[0]["evaluations"]])
            per_step = of[0]["num_rollouts"] / max(steps[-1], 1)
            curve = np.mean([[e["accuracy"] for e in o["evaluations"]] for o in of], 0)
            spent = mean(o["num_reference_rollouts"] for o in of) + steps * per_step
            axes.plot(spent, curve, color=colour, linewidth=1.2, label=f"{method}, N = {n}")
        axes.set(title=task, xlabel="rollouts, pre-sampling included", ylabel="accuracy on held-out prompts")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("pvpo", measure)
