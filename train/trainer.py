"""The Trainer: from model, data and reward to a trained model. Puts a run's pieces together and tidies up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from thornback.contracts import Task
from thornback.train.config import RunConfig
from thornback.train.model import check_draft, check_model
from thornback.train.objective import Objective
from thornback.train.problem import Problem
from thornback.train.run_directory import RunDirectory
from thornback.train.settings import settings_of


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `before` and `after`: rows of evaluation.jsonl by mode, where the run evaluates."""

    directory: str
    model: str
    steps: int
    seconds: float
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: str | None = None


class Trainer:
    """Trains a model by reinforcement learning, as a configuration says.

        Trainer("recipes/demo.yaml").train()
        Trainer(model="Qwen/Qwen3-0.6B", data="problems.jsonl", reward=my_reward).train()

    `config`: a RunConfig, the path of a recipe, or nested settings such as `{"learner": {"learning_rate": 1e-5}}`.
    `model`: a model directory or hub name. `data`: the path of a dataset, or a `Task`. `reward`: a function of a
    `Completion`, several, or several by name. Everything that can be checked without Ray is checked here; raises a
    `ThornbackError` that says what is wrong.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        model: str | Path | None = None,
        data: str | Path | Task | None = None,
        reward: Any = None,
    ) -> None:
        settings = settings_of(config, model, data, reward)
        self.config = settings.config
        check_model(self.config)
        check_draft(self.config)
        self.problem = Problem.of(settings)
        self.objective = Objective.of(self.config, self.problem.names, self.problem.weights, self.problem.ranges)

    def train(self) -> RunResult:
        """Run, or go on where an earlier process of the same run stopped. Raises `KeyboardInterrupt` after Ctrl-C
        or SIGTERM, when the run is saved."""
        from thornback.train.training import run_training  # torch and Ray: errors above come without them

        started = time.monotonic()
        run, steps = run_training(self.config, self.problem, self.objective)
        if steps < self.config.run.steps:
            message = f"stopped and saved after step {steps}; the same command goes on from there"
            run.event("interrupted", message)
            print(f"{run.location}: {message}.", file=sys.stderr)
            raise KeyboardInterrupt
        return finish(run, steps, time.monotonic() - started)


def finish(run: RunDirectory, steps: int, seconds: float) -> RunResult:
    """The run's summary.json and report."""
    earlier = run.read_text("summary.json")
    if earlier is not None and json.loads(earlier)["steps"] == steps:
        print(f"{run.location}: finished already; raise run.steps to go on.", file=sys.stderr)
        return RunResult(**json.loads(earlier))
    rows = run.evaluation.read()
    result = RunResult(
        directory=run.location,
        model=run.at("model"),
        steps=steps,
        seconds=seconds,
        before={row["mode"]: row for row in rows if row["step"] == 0},
        after={row["mode"]: row for row in rows if row["step"] == steps},
        report=run.at("report.html") if run.is_local else None,
    )
    run.write_text("summary.json", json.dumps(asdict(result), indent=1))
    run.flush()
    if run.is_local:
        from thornback.train.report import write_report

        write_report(run.root)
    return result
