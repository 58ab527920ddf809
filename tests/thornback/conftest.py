"""`run_cli`: the command line as a person runs it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finished:
    """How a command ended, and in how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


@pytest.fixture
def cli_environment(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that finds this repository, and modules that a test writes to `tmp_path`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}


@pytest.fixture
def run_cli(tmp_path: Path, cli_environment: dict[str, str]) -> Callable[..., Finished]:
    """`run_cli("train", "recipe.yaml")` runs `python -m thornback ...` in `tmp_path`."""

    def run(*arguments: str, timeout: float = 60) -> Finished:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "thornback", *arguments],
            cwd=tmp_path,
            env=cli_environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    return run
