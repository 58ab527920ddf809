"""`thornback serve` and `thornback status`."""

from __future__ import annotations

import argparse
from typing import Any

from thornback.train.config import apply_override


def add_commands(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("serve", help="an OpenAI-compatible endpoint for a run's model or a model directory")
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run directory, or a model in Hugging Face layout")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see docs/configuration.md")
    parser.add_argument("--host", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="the port to listen on (default: 8000; 0 takes a free one)")
    parser.add_argument("--engine", help="torch, vllm, or auto: vllm on GPUs (default: torch; docs/vllm.md)")
    parser.add_argument("--speculate", choices=["off", "rasd"], help="several tokens a pass (docs/speculation.md)")
    parser.add_argument("--datastore", metavar="FILE", help="guess from what thornback datastore build has written")
    parser.add_argument("--draft", metavar="DIRECTORY", help="guess by a draft head, or by a small model")
    parser.add_argument("--pd", action="store_true", help="compute prompts and answers by replicas of their own")
    parser.set_defaults(run=run)
    parser = commands.add_parser("status", help="what a server's replicas do now")
    parser.add_argument("url", metavar="URL", nargs="?", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="print it once instead of showing it until Ctrl-C")
    parser.set_defaults(run=status)


def status(arguments: argparse.Namespace) -> None:
    from thornback.serve.status import watch

    watch(arguments.url, arguments.once)


def run(arguments: argparse.Namespace) -> None:
    from thornback.serve import run as serve

    serve(arguments.model, **settings(arguments))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The overrides as nested settings; flags are settings too."""
    nested: dict[str, Any] = {}
    for override in arguments.overrides:
        apply_override(nested, override)
    flags = {
        "host": arguments.host,
        "port": arguments.port,
        "prefill_replicas": 1 if arguments.pd and "prefill_replicas" not in nested else None,
        "engine.name": arguments.engine,
        "speculation.method": arguments.speculate,
        "speculation.datastore": arguments.datastore,
        "speculation.draft": arguments.draft,
    }
    for name, value in flags.items():
        if value is not None:
            section, _, last = name.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[last] = value
    return nested
