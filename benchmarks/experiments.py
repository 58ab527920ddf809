"""Grids of small training runs, to compare methods over seeds. Each run is a Ray task of one thread, and is kept in a
file of its own as soon as it is done: a grid that is stopped goes on where it was, and two of its runs go at once.

A run trains in one process with the classes that the actors are made of, in the order of `train/loop.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from thornback.train.sections import AnchorsSection
from thornback.train.settings import Settings
from thornback.train.tokenize import tokenize_prompts

RATES, SEARCH_SEEDS = (1e-4, 2e-4, 4e-4), (100, 101)  # of the searches for learning rates
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 12: 2.201, 16: 2.131}


@dataclass(frozen=True)
class Experiment:
    """One run of a grid: `labels` tell it from the others, `settings` are a recipe's, `model` is where it starts.

    `running_baseline`: the anchors of pvpo are not estimated before, but are the mean of all rewards that a prompt has
    had so far in training, the present ones included where it is met for the first time.
    """

    labels: Mapping[str, Any]
    settings: Mapping[str, Any]
    model: str
    running_baseline: bool = False

    @property
    def key(self) -> str:
        """Of all that its outcome depends on, but for the code."""
        text = json.dumps([dict(self.settings), self.model, self.running_baseline], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def kept() -> Path:
    """Where outcomes and models are kept: `$XDG_CACHE_HOME/thornback/experiments`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "thornback", "experiments")


def run_grid(name: str, experiments: Sequence[Experiment], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The outcomes of all, in order, those that earlier calls have left in the cache among them. Each is what `train`
    returns, with its labels."""
    directory = kept() / name
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{experiment.key}.json" for experiment in experiments]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    say(f"{len(experiments) - len(missing)} of {len(experiments)} runs are there already")
    environment = {**ACTOR_ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    with cluster(None):
        remote = ray.remote(_train_into).options(num_cpus=1, max_retries=2, runtime_env={"env_vars": environment})
        waiting = {remote.remote(experiments[i], str(files[i])): i for i in missing}
        began = time.monotonic()
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            ray.get(done)
            number = len(missing) - len(waiting) + 1
            labels = ", ".join(f"{k} {v}" for k, v in experiments[waiting.pop(done)].labels.items())
            left = (time.monotonic() - began) / number * len(waiting) / 60
            say(f"run {number} of {len(missing)}: {labels}; about {left:.0f} min left")
    return [{**e.labels, **json.loads(f.read_text())} for e, f in zip(experiments, files, strict=True)]


def tuned(
    name: str,
    tasks: Iterable[str],
    methods: Sequence[str],
    run: Callable[[str, str, int, float], Experiment],
    score: Callable[[Mapping[str, Any]], float],
    say: Callable[[str], None],
) -> dict[tuple[str, str], float]:
    """By task and method, that of `RATES` with the best mean `score` over `SEARCH_SEEDS`; `run` makes the run of a
    task, method, seed and learning rate."""
    keys = list(product(tasks, methods, RATES, SEARCH_SEEDS))
    outcomes = run_grid(name, [run(task, method, seed, rate) for task, method, rate, seed in keys], say)
    scores: dict[tuple[str, str], dict[float, float]] = {}
    for (task, method, rate, _), outcome in zip(keys, outcomes, strict=True):
        of = scores.setdefault((task, method), dict.fromkeys(RATES, 0.0))
        of[rate] += score(outcome)
    return {key: max(of, key=of.__getitem__) for key, of in scores.items()}


def _train_into(experiment: Experiment, file: str) -> None:
    outcome = json.dumps(train(experiment.settings, experiment.model, experiment.running_baseline))
    partial = Path(f"{file}.partial")
    partial.write_text(outcome)
    partial.rename(file)


def warmed(task: str, settings: Mapping[str, Any], say: Callable[[str], None]) -> str:
    """The directory of a model that is warmed up as `settings` say; kept."""
    key = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=10).hexdigest()
    directory = kept() / "warm" / f"{task}-{key}"
    config = make_config({**settings, "run": {**settings.get("run", {}), "dir": str(directory)}})
    if not (directory / "warm").exists():
        say(f"warming up a model for {task}, seed {config.run.seed}")
        with cluster(None):
            starting_model(config, RunDirectory(str(directory)), load_task(config.task.name, config.task.options))
    return str(directory / "warm")


def train(settings: Mapping[str, Any], model: str, running_baseline: bool = False) -> dict[str, Any]:
    """One run from `model`, on one thread. Returns `steps`, what each step measured; `evaluations`, of the policy after
    so many steps on held-out prompts; `num_rollouts` that were trained on, and `num_reference_rollouts` before."""
    began = time.monotonic()
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

    def _anchors(self, prompts: list[TokenizedPrompt], section: AnchorsSection) -> dict[str, Anchor]:
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
