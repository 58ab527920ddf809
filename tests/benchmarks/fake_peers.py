"""Peers of the harness's own tests: they write down when they work."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from benchmarks.worker import TurnTaker


def steady(turns: TurnTaker, name: str, diary: str, seconds: float) -> None:
    """Works for `seconds` a turn, and says so in the diary."""
    print("noise on stdout must not disturb the harness")
    while turns.wait():
        with open(diary, "a") as file:
            print(name, "begins", file=file, flush=True)
            time.sleep(seconds)
            print(name, "ends", file=file, flush=True)
        turns.report(seconds=seconds, flag=float(os.environ.get("FLAG", "0")))


def counts(turns: TurnTaker, text: str) -> None:
    while turns.wait():
        turns.report(length=len(text))


def dies(turns: TurnTaker) -> None:
    while turns.wait():
        raise ValueError("the peer's own words")


def hangs(turns: TurnTaker, child_pid: str) -> None:
    """Starts a process and never answers."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(child_pid, "w") as file:
        print(child.pid, file=file)
    turns.wait()
    time.sleep(600)
