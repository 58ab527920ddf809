"""`thornback submit`: a Ray job that trains a recipe, with this directory as its working directory."""

from __future__ import annotations

import argparse


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("submit", help="train a recipe as a job of a Ray cluster")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the recipe's, as a.b=value")
    parser.add_argument("--address", required=True, help="the cluster's dashboard, http://HOST:8265")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    raise NotImplementedError
