"""Grids of small training runs, to compare methods over seeds. Each run is a Ray task of one thread, and what came of
it is kept as soon as it is done: a grid that is stopped goes on where it was. Two of its runs go at once on two cores.

A run trains in one process with the classes that the actors are made of, in the order of `train/loop.py`.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import ray

from thornback.actors import EpisodeSpec, RewardTable, anchors_of
from thornback.actors.anchor_sampler import with_trajectory
from thornback.actors.learner import LearnerCore
from thornback.actors.reward_model import RewardModelCore
from thornback.actors.rollout_worker import RolloutWorkerCore
from thornback.algorithms import fate
from thornback.contracts import Anchor, SamplingParams
from thornback.data import load_task
from thornback.engine import ACTOR_ENVIRONMENT
from thornback.train.cluster import cluster
from thornback.train.config import RunConfig, make_config
from thornback.train.crew import learner_spec_of, rollout_spec_of, sampling_of
from thornback.train.evaluation import evaluation_row
from thornback.train.model import starting_model
from thornback.train.objective import Objective, reward_metrics
from thornback.train.presampling import worth_training
from thornback.train.problem import Problem
from thornback.train.prompts import PromptBatch, PromptSource, TokenizedPrompt, make_prompt_batch, seed_of
from thornback.train.run_directory import RunDirectory
from thornback.train.sections import AnchorsConstants
from thornback.train.settings import Settings
from thornback.train.tokenize import tokenize_prompts

SEARCH_SEEDS = (100, 101)  # of the searches for learning rates
RUNS = Path(__file__).parents[1] / "docs" / "results" / "runs"
KEPT = ("reward/", "advantage/mean_square", "advantage/abs_max", "grad_norm", "weight/", "tool_calls")
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 12: 2.201, 16: 2.131}


@dataclass(frozen=True)
class WarmUp:
    """A model that runs start from: made as `settings` say when a run first needs it, then kept."""

    task: str
    settings: Mapping[str, Any]

    @property
    def directory(self) -> Path:
        return kept() / "warm" / f"{self.task}-{_digest(dict(self.settings))}"

    @property
    def model(self) -> str:
        return str(self.directory / "warm")

    def make(self, say: Callable[[str], None]) -> None:
        if Path(self.model).exists():
            return
        config = make_config({**self.settings, "run": {**self.settings["run"], "dir": str(self.directory)}})
        steps = self.settings["warm_start"]["steps"]
        say(f"warming up a model for {self.task}, seed {config.run.seed}, by {steps} steps")
        task = load_task(config.task.name, config.task.options)
        starting_model(config, RunDirectory(str(self.directory)), task)


@dataclass(frozen=True)
class Experiment:
    """One run of a grid: `labels` tell it from the others, `settings` are a recipe's, `start` is the model that it
    trains, `larger` another one that the settings name.

    `running_baseline`: the anchors of pvpo are not estimated before, but are the mean of all rewards that a prompt has
    had so far in training, the present ones included where it is met for the first time.
    """

    labels: Mapping[str, Any]
    settings: Mapping[str, Any]
    start: WarmUp
    larger: WarmUp | None = None
    running_baseline: bool = False

    @property
    def key(self) -> str:
        """Of all that its outcome depends on, but for the code."""
        return _digest([dict(self.settings), self.start.model, self.running_baseline])


class Outcomes:
    """What has come of a grid's runs, by their keys. A file of JSON lines; a run is in it once it is done."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text() if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # who wrote it was killed in the middle of a line
            file.write_text(whole)
        self._by_key = {line["key"]: line for line in map(json.loads, whole.splitlines())}

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._by_key[key]

    def add(self, experiment: Experiment, outcome: Mapping[str, Any]) -> None:
        """Of its steps, the metrics that start as one of `KEPT`: by name, a number for each step."""
        names = {name: None for step in outcome["steps"] for name in step if name.startswith(KEPT)}
        steps = {name: [step.get(name) for step in outcome["steps"]] for name in names}
        line = {"key": experiment.key, **experiment.labels, **outcome, "steps": steps}
        self._by_key[experiment.key] = line
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def outcomes_of(name: str, quick: bool) -> Outcomes:
    """Those of a benchmark: kept with its results, so that a grid of many hours can be made in several goes."""
    return Outcomes((kept() if quick else RUNS) / f"{name}.jsonl")


def series(outcome: Mapping[str, Any], name: str) -> np.ndarray:
    """A metric at each step; 0 where there was none."""
    values = outcome["steps"].get(name, [None] * outcome["num_steps"])
    return np.array([0.0 if value is None else value for value in values])


def kept() -> Path:
    """Where models are kept, and what comes of quick runs: `$XDG_CACHE_HOME/thornback/experiments`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "thornback", "experiments")


def _digest(value: Any) -> str:
    """Of what JSON says of it, wherever models are kept."""
    text = json.dumps(value, sort_keys=True).replace(str(kept()), "")
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def run_grid(experiments: Sequence[Experiment], outcomes: Outcomes, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """What has come of each, in order: what `train` returns, with its labels. Makes those that are not in `outcomes`,
    and adds them."""
    missing = [e for e in experiments if e.key not in outcomes]
    say(f"{len(experiments) - len(missing)} of {len(experiments)} runs are there already")
    if missing:
        _make(missing, outcomes, say)
    return [{**outcomes[e.key], **e.labels} for e in experiments]


def _make(missing: Sequence[Experiment], outcomes: Outcomes, say: Callable[[str], None]) -> None:
    environment = {**ACTOR_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    with cluster(None):
        for experiment in missing:
            for start in (experiment.start, experiment.larger):
                if start is not None:
                    start.make(say)
        remote = ray.remote(train).options(num_cpus=1, max_retries=2, runtime_env={"env_vars": environment})
        waiting = {remote.remote(e.settings, e.start.model, e.running_baseline): e for e in missing}
        began = time.monotonic()
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            experiment = waiting.pop(done)
            outcomes.add(experiment, ray.get(done))
            number = len(missing) - len(waiting)
            labels = ", ".join(f"{k} {v}" for k, v in experiment.labels.items())
            left = (time.monotonic() - began) / number * len(waiting) / 60
            say(f"run {number} of {len(missing)}: {labels}; about {left:.0f} min left")


def tuned(
    outcomes: Outcomes,
    rates: Mapping[str, Sequence[float]],
    methods: Sequence[str],
    run: Callable[[str, str, int, float], Experiment],
    score: Callable[[Mapping[str, Any]], float],
    say: Callable[[str], None],
) -> dict[tuple[str, str], float]:
    """By task and method, that of its `rates` with the best mean `score` over `SEARCH_SEEDS`; `run` makes the run
    of a task, method, seed and learning rate."""
    keys = [(task, *rest) for task in rates for rest in product(methods, rates[task], SEARCH_SEEDS)]
    found = run_grid([run(task, method, seed, rate) for task, method, rate, seed in keys], outcomes, say)
    scores: dict[tuple[str, str], dict[float, float]] = {}
    for (task, method, rate, _), outcome in zip(keys, found, strict=True):
        of = scores.setdefault((task, method), dict.fromkeys(rates[task], 0.0))
        of[rate] += score(outcome)
    return {key: max(of, key=of.__getitem__) for key, of in scores.items()}


def train(settings: Mapping[str, Any], model: str, running_baseline: bool = False) -> dict[str, Any]:
    """One run from `model`, on one thread. Returns `steps`, what each step measured; `evaluations`, of the policy after
    so many steps on held-out prompts; `num_rollouts` that were trained on, and `num_reference_rollouts` before."""
    began = time.monotonic()
    gc.unfreeze()  # a rollout worker freezes what is loaded, since it stays for good: here it goes with its run
    gc.collect()
    config = make_config({**settings, "model": {"path": model}})
    run = _Run(config, model, running_baseline)
    evaluations, steps = [run.evaluate(0)], []
    for step in range(config.run.steps):
        steps.append(run.step(step))
        if (step + 1) % config.evaluation.every == 0 or step + 1 == config.run.steps:
            evaluations.append(run.evaluate(step + 1))
    return {
        "steps": steps,
        "evaluations": evaluations,
        "num_steps": config.run.steps,
        "num_rollouts": config.run.steps * config.data.prompts_per_step * config.rollout.samples_per_prompt,
        "num_reference_rollouts": run.num_reference_rollouts,
        "num_prompts": len(run.source.prompts),
        "seconds": time.monotonic() - began,
    }


class _Run:
    """What a run is made of."""

    def __init__(self, config: RunConfig, model: str, running_baseline: bool) -> None:
        problem = Problem.of(Settings(config))
        self.problem = problem
        self.running = _Running() if running_baseline else None
        self.config = config
        self.objective = Objective.of(config, problem.names, problem.weights, problem.ranges)
        self.sampling = sampling_of(config)
        self.worker = RolloutWorkerCore(rollout_spec_of(config, model, problem))
        self.worker.setup()
        self.judge = RewardModelCore(problem.make_scorer, model)
        self.judge.setup()
        self.learner = LearnerCore(learner_spec_of(config, model), 0)
        self.learner.setup()
        self.episodes: EpisodeSpec | None = problem.episodes
        prompts, _ = tokenize_prompts(config, problem.task, model, "train", config.data.num_prompts)
        self.test, _ = tokenize_prompts(config, problem.task, model, "test", config.evaluation.num_prompts)
        self.num_reference_rollouts = 0
        self.anchors: dict[str, Anchor] | None = None
        if config.anchors is not None and not running_baseline:
            self.anchors = self._anchors(prompts, config.anchors)
            prompts = worth_training(prompts, self.anchors, config)
        self.source = PromptSource(prompts, config.run.seed, config.data.prompts_per_step)

    def _anchors(self, prompts: list[TokenizedPrompt], section: AnchorsConstants) -> dict[str, Anchor]:
        """As pre-sampling estimates them, with a larger model's right answers where one is configured."""
        found = self._sampled(prompts, self.worker, section.num_rollouts, "reference", keep=False)
        unsolved = [p for p in prompts if fate(found[p.prompt.key].accuracy) == "ask"]
        if section.larger_model is not None and unsolved:
            larger = RolloutWorkerCore(rollout_spec_of(self.config, section.larger_model, self.problem))
            larger.setup()
            answers = self._sampled(unsolved, larger, section.larger_model_rollouts, "larger", keep=True)
            found |= {key: replace(found[key], trajectory=a.trajectory) for key, a in answers.items()}
        return found

    def _sampled(
        self, prompts: list[TokenizedPrompt], worker: RolloutWorkerCore, num_rollouts: int, who: str, keep: bool
    ) -> dict[str, Anchor]:
        seeds = [seed_of(self.config.run.seed, who, p.prompt.key) for p in prompts]
        sampling = SamplingParams(n=num_rollouts, max_tokens=self.sampling.max_tokens)
        found: dict[str, Anchor] = {}
        for piece in make_prompt_batch(prompts, seeds).split(math.ceil(len(prompts) / 32)):
            batch, _ = worker.generate(piece.shard, sampling, 0, piece.prompts if self.episodes else ())
            table = self.judge.score(batch, piece.prompts)
            anchors = anchors_of(piece.shard.keys, table, num_rollouts)
            if keep:
                anchors = [with_trajectory(a, i * num_rollouts, batch, table) for i, a in enumerate(anchors)]
            found |= {anchor.prompt_key: anchor for anchor in anchors}
        self.num_reference_rollouts += num_rollouts * len(prompts)
        return found

    def _answered(self, batch: PromptBatch, sampling: SamplingParams, version: int) -> tuple[Any, Any]:
        rollouts, _ = self.worker.generate(batch.shard, sampling, version, batch.prompts if self.episodes else ())
        return rollouts, self.judge.score(rollouts, batch.prompts)

    def step(self, step: int) -> dict[str, float]:
        batch = self.source.batch(step, self.anchors)
        rollouts, table = self._answered(batch, self.sampling, step)
        if self.running is not None:
            self.anchors = self.running.anchors(batch.shard.keys, table, self.sampling.n)
        advantages = self.objective.advantages(table, self.sampling.n, batch.shard.keys, self.anchors)
        report = self.learner.update(step, advantages.values, rollouts)
        buffer, index = self.learner.weights()
        assert buffer is not None
        self.worker.load_weights(buffer, index, step + 1)
        measured = reward_metrics(table) | advantages.metrics | report.metrics
        return {key: round(value, 6) for key, value in measured.items() if math.isfinite(value)}

    def evaluate(self, step: int) -> dict[str, Any]:
        """Each held-out prompt answered once, sampled, with the same seeds for all runs of a seed."""
        seeds = [seed_of(self.config.run.seed, "evaluation", p.prompt.key) for p in self.test]
        sampling = SamplingParams(n=1, max_tokens=self.sampling.max_tokens)
        _, table = self._answered(make_prompt_batch(self.test, seeds), sampling, step)
        return {"step": step, **evaluation_row(table)}


class _Running:
    """Means of rewards by prompt, over all times that it was met before; at the first time, over that one."""

    def __init__(self) -> None:
        self._met: dict[str, list[Anchor]] = {}

    def anchors(self, keys: Sequence[str], table: RewardTable, num_rollouts: int) -> dict[str, Anchor]:
        found = {}
        for anchor in anchors_of(keys, table, num_rollouts):
            before = self._met.setdefault(anchor.prompt_key, [])
            means = {name: float(np.nanmean([a.rewards[name] for a in before or [anchor]])) for name in anchor.rewards}
            found[anchor.prompt_key] = replace(anchor, rewards=means)
            before.append(anchor)
        return found


def over(ours: float, theirs: float) -> float:
    """Their ratio; 1 where neither has learned anything, as after the few steps of a quick run."""
    return ours / theirs if theirs else 1.0 if ours == theirs else math.inf


def hypervolume(points: np.ndarray, reference: tuple[float, float] = (0.0, 0.0)) -> float:
    """The area that `points` `[N, 2]`, of which more is better, dominate above `reference`."""
    area, highest = 0.0, reference[1]
    for x, y in sorted(points.tolist(), reverse=True):
        if y > highest:
            area += max(0.0, x - reference[0]) * (y - highest)
            highest = y
    return area


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and the bounds of its 95% interval (Student's t)."""
    values = np.asarray(differences, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    t = _T.get(len(values)) or next((t for n, t in sorted(_T.items(), reverse=True) if n < len(values)), 12.706)
    half = t * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half
