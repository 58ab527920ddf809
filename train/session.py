"""What every job of a run needs: its directory, its problem, the model that it starts from, and its prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import yaml

from thornback.actors import Restarts
from thornback.contracts import ConfigError
from thornback.train.cluster import cluster
from thornback.train.config import RunConfig
from thornback.train.model import starting_model
from thornback.train.problem import Problem
from thornback.train.prompts import TokenizedPrompt
from thornback.train.run_directory import RunDirectory
from thornback.train.tokenize import tokenize_prompts

# Settings that a run may change between two of its lives: they do not change what it computes.
FREE = {
    "run.name",
    "run.dir",
    "run.steps",
    "run.timeout_seconds",
    "run.max_restarts",
    "run.address",
    "run.save_rollouts",
    "evaluation",
    "checkpoint",
    "serve",
}


@dataclass
class Session:
    """A run that is being worked on, while Ray is up."""

    config: RunConfig
    problem: Problem
    run: RunDirectory
    model: str

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, problem: Problem) -> Iterator[Session]:
        """The run's directory and cluster, with the starting model made if need be."""
        run = open_run(config)
        with cluster(config.run.address):
            yield cls(config, problem, run, starting_model(config, run, problem.task))

    @cached_property
    def restarts(self) -> Restarts:
        return Restarts(self.config.run.max_restarts, self.run.event)

    @cached_property
    def train_prompts(self) -> list[TokenizedPrompt]:
        return self._prompts("train", self.config.data.num_prompts)

    @cached_property
    def test_prompts(self) -> list[TokenizedPrompt]:
        return self._prompts("test", self.config.evaluation.num_prompts)

    def _prompts(self, split: str, count: int | None) -> list[TokenizedPrompt]:
        prompts, too_long = tokenize_prompts(self.config, self.problem.task, self.model, split, count)
        if too_long:
            some = ", ".join(too_long[:5]) + (", ..." if len(too_long) > 5 else "")
            message = f"{len(too_long)} prompts of {split} are too long for the model and left out: {some}"
            self.run.event("prompts_left_out", message)
            print(message, file=sys.stderr)
        return prompts


def open_run(config: RunConfig) -> RunDirectory:
    """The run's directory with its config.yaml; raises `ConfigError` if it belongs to a run with other settings."""
    run = RunDirectory(config.directory)
    text = run.read_text("config.yaml")
    if text is not None:
        changed = _changed(yaml.safe_load(text), yaml.safe_load(config.to_yaml()))
        if changed:
            raise ConfigError(
                f"{run.location} holds a run with other settings ({', '.join(changed)}); take another run.dir, "
                "remove the directory, or take the settings back."
            )
    run.write_text("config.yaml", config.to_yaml())
    return run


def _changed(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ and matter."""
    changed = []
    for key in sorted({*before, *now}):
        dotted = f"{prefix}{key}"
        if dotted in FREE or before.get(key) == now.get(key):
            continue
        if isinstance(before.get(key), dict) and isinstance(now.get(key), dict):
            changed += _changed(before[key], now[key], f"{dotted}.")
        else:
            changed.append(dotted)
    return changed
