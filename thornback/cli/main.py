"""Reads the command line, runs one command, and turns what went wrong into one sentence and an exit code.

Exit codes: 0 done; 2 something that the user can put right (one sentence on stderr, no traceback); 130
interrupted; 141 the reader of our output left. Anything else that escapes is a bug: its traceback stays, and
Python exits with 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import thornback
from thornback.cli import datastore, demo, draft, reward_model, serving, submit, training
from thornback.contracts import ThornbackError

USER_ERROR = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; each sets `run`, a function of the parsed arguments that returns None."""
    parser = argparse.ArgumentParser(
        prog="thornback",
        description="Post-train language models on several rewards at once, and serve them, on one Ray cluster.",
    )
    parser.add_argument("--version", action="version", version=f"thornback {thornback.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, training, serving, datastore, draft, reward_model, submit):
        module.add_commands(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed command line; `key=value` settings may stand before and after options, which argparse cannot."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strangers = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        arguments.overrides += rest
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # libgomp's spinning threads starve each other where processes share cores; this must precede torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours is the one bar
    arguments = parse(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()  # here, and not at the interpreter's end, where nobody can catch what it raises
    except ThornbackError as error:
        print(f"thornback: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("thornback: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    return 0
