"""Puts a training run together: session, anchors, actors, loop; shows it, and writes the model at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from thornback.train.checkpoint import Checkpoints
from thornback.train.config import RunConfig
from thornback.train.crew import Crew
from thornback.train.evaluation import Evaluator
from thornback.train.gauges import Gauges
from thornback.train.loop import Loop
from thornback.train.objective import Objective
from thornback.train.presampling import anchors_for, refreshed_anchors, worth_training
from thornback.train.problem import Problem
from thornback.train.progress import ProgressBar
from thornback.train.prompts import PromptSource
from thornback.train.run_directory import RunDirectory
from thornback.train.session import Session, open_run
from thornback.train.speculation import RolloutSpeculation
from thornback.train.tensorboard import TensorBoard


def run_training(config: RunConfig, problem: Problem, objective: Objective) -> tuple[RunDirectory, int]:
    """Train, or go on; returns the run's directory and the steps that it has done. A run that has finished starts
    nothing."""
    run = open_run(config)
    if is_finished(run, config.run.steps):
        return run, config.run.steps
    with Session.open(config, problem) as session:
        return session.run, train_in(session, objective)


def is_finished(run: RunDirectory, steps: int) -> bool:
    """Whether an earlier process has done all steps, and what comes after them."""
    summary = run.read_text("summary.json")
    return summary is not None and json.loads(summary)["steps"] == steps and run.exists("model")


def train_in(session: Session, objective: Objective) -> int:
    """The loop and what it needs; returns the steps done. The model is written when all are."""
    config, run = session.config, session.run
    anchors = anchors_for(session) if config.anchors is not None else None
    prompts = session.train_prompts if anchors is None else worth_training(session.train_prompts, anchors, config)
    speculation = RolloutSpeculation(config, run) if config.rollout.speculate == "rasd" else None
    crew = Crew(config, session.model, session.problem, session.restarts, speculation=speculation)
    try:
        loop = Loop(
            config=config,
            run=run,
            crew=crew,
            prompts=PromptSource(prompts, config.run.seed, config.data.prompts_per_step, config.data.shuffle),
            objective=objective,
            evaluator=Evaluator(config, run, crew, session.test_prompts) if config.evaluation.every else None,
            checkpoints=Checkpoints(run, config.checkpoint.keep),
            restarts=session.restarts,
            anchors=anchors,
            refresh=lambda step, name: refreshed_anchors(session, crew, prompts, anchors or {}, step, name),
        )
        steps = show(loop, run, config.run.steps)
        if steps >= config.run.steps and crew.learner is not None:
            export(run, crew.learner.export)
        return steps
    finally:
        crew.shutdown()


def show(loop: Loop, run: RunDirectory, total_steps: int) -> int:
    """Train, with a progress bar, TensorBoard files and gauges; returns the steps done."""
    latest = loop.checkpoints.latest()
    start_step = latest.step if latest else 0
    board, gauges = TensorBoard(run, start_step), Gauges(loop.config.run.name)
    try:
        with ProgressBar(total_steps, start_step) as bar:

            def on_step(metrics: Mapping[str, Any]) -> None:
                bar.update(metrics)
                board.update(metrics)
                gauges.update(metrics)

            loop.on_step = on_step
            return loop.train()
    finally:
        board.close()
        run.flush()


def export(run: RunDirectory, write: Callable[[str], None]) -> None:
    """The finished model as RUN/model, whole or not at all."""
    run.make_empty(".model.tmp")
    write(run.at(".model.tmp"))
    run.remove("model")
    run.filesystem.move(run.path(".model.tmp"), run.path("model"))
