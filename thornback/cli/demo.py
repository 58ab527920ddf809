"""`thornback demo`: the whole story, from a model built from nothing to questions asked through HTTP."""

from __future__ import annotations

import argparse


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo", help="build, train, serve and ask a small model, in twelve minutes on two cores"
    )
    parser.add_argument(
        "--task",
        choices=("arithmetic", "multihop"),
        default="arithmetic",
        help="sums, worked column by column; or an agent that searches several times (default: %(default)s)",
    )
    parser.add_argument("--engine", default="torch", help="of rollouts: torch, or vllm (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another run (default: %(default)s)")
    parser.add_argument(
        "--out", default="", metavar="DIR", help="the run directory (default: runs/demo-SEED, runs/demo-TASK-SEED)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from thornback.demo import run_demo

    run_demo(seed=arguments.seed, directory=arguments.out, task=arguments.task, engine=arguments.engine)
