"""The smaller jobs of a run, as the command line and Python call them: pre-sampling and evaluation."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from thornback.contracts import Anchor, ConfigError
from thornback.train.config import RunConfig
from thornback.train.crew import Crew
from thornback.train.evaluation import Evaluator
from thornback.train.model import check_model
from thornback.train.presampling import anchors_for, worth_training
from thornback.train.problem import Problem
from thornback.train.session import Session
from thornback.train.settings import Settings


def presample(config: RunConfig) -> dict[str, Anchor]:
    """Sample the anchors of a run's training prompts, unless it has them; prints what the filter leaves."""
    if config.anchors is None:
        raise ConfigError("anchors: the recipe has no such section; add one, or the override anchors={}.")
    check_model(config)
    with Session.open(config, Problem.of(Settings(config))) as session:
        anchors = anchors_for(session)
        kept = worth_training(session.train_prompts, anchors, config)
    solved = sum(a.accuracy == 1.0 for a in anchors.values())
    unsolved = sum(a.accuracy == 0.0 for a in anchors.values())
    Console().print(
        f"{len(anchors)} prompts: {solved} always solved, {unsolved} never, {len(kept)} worth training on; "
        f"written to {session.run.at('anchors.parquet')}",
        highlight=False,
    )
    return anchors


def evaluate(config: RunConfig) -> list[dict[str, Any]]:
    """Measure a run's model on the held-out prompts: its trained one if it has finished, else the one that it starts
    from. Prints a table and returns one row a mode."""
    check_model(config)
    problem = Problem.of(Settings(config))
    with Session.open(config, problem) as session:
        model = session.run.at("model") if session.run.exists("model") else session.model
        crew = Crew(config, model, problem, session.restarts, with_learner=False)
        try:
            crew.wait_ready()
            rows = Evaluator(config, session.run, crew, session.test_prompts).evaluate(step=0, version=0)
        finally:
            crew.shutdown()
    for row in rows:
        del row["step"]
    Console().print(_table(model, rows))
    return rows


def _table(model: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=model, title_justify="left")
    for heading in ("", *(row["mode"] for row in rows)):
        table.add_column(heading, justify="right" if heading else "left")
    for key in rows[0]:
        if key != "mode":
            table.add_row(key, *(f"{row[key]:.4g}" for row in rows if key in row))
    return table
