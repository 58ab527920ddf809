"""`thornback train`, `presample`, `eval` and `report`."""

from __future__ import annotations

import argparse
from typing import Any


def add_commands(commands: argparse._SubParsersAction) -> None:
    for name, help_text, run in (
        ("train", "reinforcement learning as a recipe says; a killed run goes on where it was", train),
        ("presample", "reference rollouts of each prompt: anchors, and which prompts are worth training on", presample),
        ("eval", "accuracy and rewards on the held-out prompts", evaluate),
    ):
        parser = commands.add_parser(name, help=help_text)
        add_recipe_arguments(parser)
        parser.set_defaults(run=run)
    parser = commands.add_parser("report", help="write a run's report.html again")
    parser.add_argument("run_directory", metavar="RUN")
    parser.set_defaults(run=report)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; see recipes/ and docs/configuration.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, as a.b=value")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and stop")


def load(arguments: argparse.Namespace) -> Any:
    """The recipe with its overrides as a RunConfig; raises ConfigError."""
    from thornback.train.config import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)


def train(arguments: argparse.Namespace) -> None:
    config = load(arguments)
    from thornback.train import Trainer

    Trainer(config).train()


def presample(arguments: argparse.Namespace) -> None:
    config = load(arguments)
    from thornback.train import presample

    presample(config)


def evaluate(arguments: argparse.Namespace) -> None:
    config = load(arguments)
    from thornback.train import evaluate

    evaluate(config)


def report(arguments: argparse.Namespace) -> None:
    from thornback.train.report import write_report

    print(write_report(arguments.run_directory))
