"""`thornback train`, `presample`, `eval` and `report`."""

from __future__ import annotations

import argparse

from thornback.cli.dry_run import describe
from thornback.train.config import RunConfig, load_recipe


def add_commands(commands: argparse._SubParsersAction) -> None:
    for name, help_text, job in (
        ("train", "reinforcement learning as a recipe says; a killed run goes on where it was", train),
        ("presample", "reference rollouts of each prompt: anchors, and which prompts are worth training on", presample),
        ("eval", "accuracy and rewards on the held-out prompts", evaluate),
    ):
        parser = commands.add_parser(name, help=help_text)
        parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; see recipes/ and docs/configuration.md")
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings over the recipe's, as a.b=value"
        )
        parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")
        parser.set_defaults(run=run_recipe, job=job)
    parser = commands.add_parser("report", help="write a run's report.html again")
    parser.add_argument("run_directory", metavar="RUN")
    parser.set_defaults(run=report)


def run_recipe(arguments: argparse.Namespace) -> None:
    """Read the recipe, and run its job or say what it would do."""
    config = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        print(describe(config))
    else:
        arguments.job(config)


def train(config: RunConfig) -> None:
    from thornback.train import Trainer

    Trainer(config).train()


def presample(config: RunConfig) -> None:
    from thornback.train.jobs import presample

    presample(config)


def evaluate(config: RunConfig) -> None:
    from thornback.train.jobs import evaluate

    evaluate(config)


def report(arguments: argparse.Namespace) -> None:
    from thornback.train.report import write_report

    print(write_report(arguments.run_directory))
