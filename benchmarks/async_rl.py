"""Rollouts that run ahead of the learner against steps that wait for their own, where a judge takes a third of a step.

The demo's kind of run: sums, 16 prompts x 8 rollouts a step, two rollout workers and two learner ranks of one thread
each, from models that are warmed up once per seed. Beside the task's rewards there is `judge`, which answers a batch of
any size after a fixed time, as a model behind an endpoint would: half of what the rest of a synchronous step takes,
measured first. Per seed the modes take turns: synchronous, and ahead by at most 1 and 2 versions.

`async_vs_sync`: rollouts trained per second, `max_staleness` 2 over synchronous, mean over seeds, evaluations not
counted (with 1, a step's rollouts and their judging must end within one update, which shares the cores with them).
`reward_vs_sync`: held-out accuracy after the last step, sampled, likewise. The picture shows accuracy over seconds, and
how many versions old the rollouts were that were trained.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.experiment_tasks import start
from benchmarks.experiments import interval, over
from benchmarks.models import cores
from benchmarks.results import Results, run
from thornback.contracts import Completion
from thornback.train import Trainer
from thornback.train.cluster import cluster
from thornback.train.run_directory import RunDirectory

MODES = {"synchronous": 0, "ahead by 1": 1, "ahead by 2": 2}
SEEDS, STEPS, EVALUATIONS = 3, 90, 6
SETTLED = 5  # steps after which a run's pace is measured


class SlowJudge:
    """Says whether the answer's last digit is right, after `seconds`, however many are asked about."""

    name, range = "judge", (0.0, 1.0)

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def score_all(self, completions: Sequence[Completion]) -> list[float]:
        time.sleep(self.seconds)
        return [self(completion) for completion in completions]

    def __call__(self, completion: Completion) -> float:
        answer = completion.text.rpartition("<answer>")[2].partition("</answer>")[0]
        return float(answer[-1:] == (completion.prompt.answer or "")[-1:])


def settings(model: str, directory: Path, seed: int, steps: int, staleness: int, seconds: float) -> dict[str, Any]:
    judge = {"function": "benchmarks.async_rl:SlowJudge", "options": {"seconds": seconds}}
    return {
        "run": {"dir": str(directory), "steps": steps, "seed": seed},
        "model": {"path": model},
        "task": {"name": "arithmetic", "options": {"num_train": 480, "num_test": 256, "budget": 34}},
        "data": {"prompts_per_step": 16},
        "rewards": {"correct": {}, "format": {}, "brevity": {}, "judge": judge},
        "rollout": {
            "max_staleness": staleness,
            "num_workers": cores(),
            "num_threads": 1,
            "max_tokens": 48,
            "engine_options": {"max_model_len": 144},
        },
        "algorithm": {"estimator": "dvao"},
        "learner": {"num_ranks": cores(), "num_threads": 1, "learning_rate": 1e-4},
        "evaluation": {"every": max(1, steps // EVALUATIONS), "num_prompts": 256, "greedy": False},
        "checkpoint": {"every": steps},
    }


def train(*arguments: Any) -> dict[str, Any]:
    """A run's pace, what it came to, and the curve."""
    values = settings(*arguments)
    Trainer(values).train()
    directory = RunDirectory(values["run"]["dir"])
    rows, evaluated = directory.metrics.read(), directory.evaluation.read()
    seconds = np.cumsum([row["step_seconds"] for row in rows])
    counted = rows[SETTLED:]
    return {
        "step_seconds": median(row["step_seconds"] for row in counted),
        "rollouts_per_second": sum(r["num_rollouts"] for r in counted) / sum(r["step_seconds"] for r in counted),
        "accuracy": evaluated[-1]["accuracy"],
        "curve": [[float(seconds[r["step"] - 1]) if r["step"] else 0.0, r["accuracy"]] for r in evaluated],
        "staleness": {
            key.rpartition("_")[2]: sum(int(row.get(key, 0)) for row in rows)
            for key in sorted({key for row in rows for key in row if key.startswith("ahead/staleness_")})
            if key.rpartition("_")[2].isdigit()
        },
        "late_groups": int(sum(row.get("ahead/late_groups", 0) for row in rows)),
    }


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    seeds, steps = (1, 15) if quick else (SEEDS, STEPS)
    models = [start("arithmetic", seed, quick) for seed in range(seeds)]
    results = Results("async_rl")
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as temporary, cluster(None):
        for model in models:
            model.make(say)
        plain = train(models[0].model, Path(temporary, "plain"), 0, 15, 0, 0.0)["step_seconds"]
        say(f"a step takes {plain:.3f} s by itself, so the judge takes {plain / 2:.3f} s")
        for seed in range(seeds):
            for mode, staleness in MODES.items():
                directory = Path(temporary, f"{staleness}-{seed}")
                found[mode].append(train(models[seed].model, directory, seed, steps, staleness, plain / 2))
                last = found[mode][-1]
                say(f"seed {seed}, {mode}: {last['rollouts_per_second']:.0f} rollouts/s, {last['accuracy']:.3f} right")
    pace, sync = {mode: [r["rollouts_per_second"] for r in runs] for mode, runs in found.items()}, "synchronous"
    for mode, runs in found.items():
        gain = [ours / theirs for ours, theirs in zip(pace[mode], pace[sync], strict=True)]
        lost = [ours["accuracy"] - theirs["accuracy"] for ours, theirs in zip(runs, found[sync], strict=True)]
        middle, low, high = interval(lost)
        results.rows.append(
            {
                "name": mode,
                "threads": cores(),
                "judge_seconds": plain / 2,
                "rollouts_per_second": mean(pace[mode]),
                "vs_sync": mean(gain),
                "accuracy": mean(r["accuracy"] for r in runs),
                "accuracy_difference": middle,
                "lower_95": low,
                "upper_95": high,
                "staleness": {
                    versions: sum(r["staleness"].get(versions, 0) for r in runs)
                    for versions in sorted({v for r in runs for v in r["staleness"]})
                },
                "late_groups": sum(r["late_groups"] for r in runs),
                "turns": pace[mode],
                "curves": [r["curve"] for r in runs],
            }
        )
    rows = {row["name"]: row for row in results.rows}
    results.ratios = {
        "async_vs_sync": rows["ahead by 2"]["vs_sync"],
        "async_1_vs_sync": rows["ahead by 1"]["vs_sync"],
        "reward_vs_sync": over(rows["ahead by 2"]["accuracy"], rows[sync]["accuracy"]),
    }
    results.plot = lambda path: draw(results.rows, path)
    return results


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy over seconds of training, means over seeds; and how old what was trained was."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, ages = figure.subplots(1, 2)
    for row, colour in zip(rows, ("#4c78a8", "black", "#e45756"), strict=True):
        curve = np.mean(row["curves"], 0)
        curves.plot(*curve.T, marker="o", markersize=3, color=colour, label=row["name"], linewidth=1)
        total = max(1, sum(row["staleness"].values()))
        if row["staleness"]:
            shift = 0.2 if row["name"] == "ahead by 2" else -0.2
            bars = [int(versions) + shift for versions in row["staleness"]]
            ages.bar(bars, [n / total for n in row["staleness"].values()], 0.38, color=colour, label=row["name"])
    curves.set(xlabel="seconds of training", ylabel="right, held out")
    ages.set(xlabel="versions that a rollout was behind", ylabel="share", xticks=[0, 1, 2])
    for axes in (curves, ages):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("async_rl", measure)
