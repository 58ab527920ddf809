"""`thornback serve`."""

from __future__ import annotations

import argparse


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("serve", help="an OpenAI-compatible endpoint for a run's model or a model directory")
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run directory, or a model in Hugging Face layout")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from thornback.serve import run as serve

    serve(arguments.model, host=arguments.host, port=arguments.port)
