"""Grids of small runs: what a run measures is what the Trainer's does, and what is done is not done again."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import dvao, experiments, pvpo
from benchmarks.experiments import Experiment, Outcomes, WarmUp, hypervolume, interval, run_grid, series, train
from tests.train.tiny_run import comparable, settings
from thornback.train import Trainer
from thornback.train.config import make_config

POINTS = st.lists(st.tuples(*[st.floats(0, 1, width=16)] * 2), min_size=1, max_size=6)


def test_hypervolumes():
    assert hypervolume(np.array([[1.0, 0.5]])) == 0.5
    assert hypervolume(np.array([[1.0, 0.5], [0.5, 1.0]])) == 0.75
    assert hypervolume(np.array([[1.0, 0.5], [0.5, 0.5]])) == 0.5
    assert hypervolume(np.array([[0.6, 0.6]]), (0.5, 0.5)) == pytest.approx(0.01)
    assert hypervolume(np.array([[0.4, 0.9]]), (0.5, 0.5)) == 0.0


@given(POINTS, st.randoms())
def test_a_hypervolume_knows_no_order_and_grows_with_better_points(points, random):
    whole = hypervolume(np.array(points))
    assert math.isclose(whole, hypervolume(np.array(random.sample(points, len(points)))), abs_tol=1e-12)
    assert whole >= max(x * y for x, y in points) - 1e-12
    assert hypervolume(np.array([*points, (0.9, 0.9)])) >= whole - 1e-12
    grid = (np.arange(64) + 0.5) / 64
    covered = np.mean([[any(x > a and y > b for x, y in points) for a in grid] for b in grid])
    assert abs(covered - whole) < 0.04


def test_intervals_of_paired_differences():
    assert interval([0.1] * 8) == pytest.approx((0.1, 0.1, 0.1))
    middle, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert (middle, low, high) == pytest.approx((2.5, 2.5 - 2.0540, 2.5 + 2.0540), abs=1e-3)
    assert interval([1.0])[1:] == (-math.inf, math.inf)


@pytest.fixture
def recipe(tiny_model, tmp_path):
    values = settings(tiny_model("qwen3"), tmp_path / "run", run={"steps": 4}, rollout={"num_workers": 1})
    values["evaluation"] = {"every": 2, "num_prompts": 16, "greedy": False}
    values["rewards"] = {name: {"function": f"tests.train.tiny_run:{name}"} for name in ("digits", "vowels")}
    return values


@pytest.mark.full
def test_a_run_measures_what_the_trainers_does(ray_cluster, recipe, tiny_model, tmp_path):
    result = Trainer(recipe).train()
    found = train({k: v for k, v in recipe.items() if k != "model"}, str(tiny_model("qwen3")))
    for ours, theirs in zip(found["steps"], comparable(tmp_path / "run"), strict=True):
        assert ours.keys() <= theirs.keys()
        for name in ours.keys() - {"mismatch/mean_abs", "mismatch/max_abs"}:
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
    assert all("loss" in row for row in found["steps"])
    last = found["evaluations"][-1]
    for name in ("accuracy", "reward/digits", "reward/vowels", "response_length"):
        assert last[name] == pytest.approx(result.after["sampled"][name], abs=1e-6), name
    assert found["num_rollouts"] == 4 * 16


@pytest.mark.full
def test_a_grid_goes_on_where_it_was_stopped(ray_cluster, recipe, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    start = WarmUp("letters", {"run": {"seed": 0}})
    shutil.copytree(tiny_model("qwen3"), start.model)
    values = {k: v for k, v in recipe.items() if k != "model"}
    grid = [Experiment({"seed": seed}, {**values, "run": {"steps": 1, "seed": seed}}, start) for seed in (0, 1)]
    said: list[str] = []
    file = tmp_path / "new" / "runs.jsonl"
    first = run_grid(grid[:1], Outcomes(file), said.append)
    with file.open("a") as cut_short:
        cut_short.write('{"key": "')
    both = run_grid(grid, Outcomes(file), said.append)
    assert both[0] == first[0]
    assert [outcome["seed"] for outcome in both] == [0, 1]
    assert both[0]["steps"] != both[1]["steps"]
    assert said[2] == "1 of 2 runs are there already"
    assert sum(line.startswith("run ") for line in said) == 2
    assert len(file.read_text().splitlines()) == 2
    assert series(both[0], "grad_norm").shape == (1,)
    assert list(series(both[0], "tool_calls")) == [0.0]


@pytest.mark.parametrize("benchmark", [dvao, pvpo])
def test_all_runs_of_a_grid_have_recipes_that_can_be_read(benchmark, monkeypatch):
    grid = benchmark.experiments(defaultdict(lambda: 1e-4), True)
    keys = {experiment.key for experiment in grid}
    assert len(keys) == len(grid)
    for experiment in grid:
        config = make_config({**experiment.settings, "model": {"path": experiment.start.model}})
        assert config.task.name == experiment.labels["task"]
        assert config.learner.learning_rate == experiment.labels["learning_rate"] == 1e-4
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert {experiment.key for experiment in benchmark.experiments(defaultdict(lambda: 1e-4), True)} == keys


def test_learning_rates_are_chosen_by_seeds_of_their_own(monkeypatch):
    """Of all rates and seeds once each, by task and method."""
    start = WarmUp("", {})

    def run(task: str, method: str, seed: int, rate: float) -> Experiment:
        return Experiment({"task": task, "method": method, "seed": seed, "rate": rate}, {}, start)

    def outcomes(grid, there, say):
        assert len({tuple(e.labels.values()) for e in grid}) == len(grid) == 2 * 2 * 3 * 2
        assert {e.labels["seed"] for e in grid}.isdisjoint(range(8))
        return [e.labels for e in grid]

    def score(outcome) -> float:
        """Best at the highest rate for the one method, at the lowest for the other, whatever one seed says."""
        luck = 1e-4 if (outcome["rate"], outcome["seed"]) == (2e-4, 101) else 0.0
        return outcome["rate"] * (1 if outcome["method"] == "a" else -1) + luck

    monkeypatch.setattr(experiments, "run_grid", outcomes)
    found = experiments.tuned(None, {"x": (1e-4, 2e-4, 4e-4), "y": (4e-4, 2e-4, 1e-4)}, "ab", run, score, print)
    assert found == {(task, method): {"a": 4e-4, "b": 1e-4}[method] for task in "xy" for method in "ab"}
