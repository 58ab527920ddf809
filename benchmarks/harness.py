"""Peers take turns: every one in a clean process of its own, never two at work at once.

A benchmark names its peers and how often they take their turn; `alternate` starts them one after the other, lets
each warm up, and then goes round: A B C, B C A, C A B, ... so that whatever the machine does meanwhile (other
tenants, heat) meets all of them alike. What counts is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, BinaryIO

ROUNDS = 7
QUICK_ROUNDS = 2
START_SECONDS = 300.0
TURN_SECONDS = 180.0
STOP_SECONDS = 20.0
SETTLE_SECONDS = 0.5  # threads of Intel's OpenMP spin for 0.2 s after their work, on cores that are the next peer's


class PeerFailed(RuntimeError):
    """A peer's process died, or missed its deadline; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Peer:
    """One contestant. `target` is `module:function`, called in a fresh interpreter as `function(turns, **settings)`
    (see benchmarks.worker). `environment` is set before that interpreter starts; None unsets a variable."""

    name: str
    target: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Turns:
    """What a peer measured: one mapping of numbers a turn, warm-up turns left out."""

    peer: Peer
    values: list[dict[str, float]]

    def median(self, name: str) -> float:
        return median(v[name] for v in self.values)

    def all(self, name: str) -> list[float]:
        """Of all turns that measured it."""
        return [v[name] for v in self.values if name in v]


def alternate(
    peers: Sequence[Peer],
    rounds: int,
    warmups: int = 1,
    say: Callable[[str], None] = lambda line: None,
    settle: float = SETTLE_SECONDS,
) -> dict[str, Turns]:
    """Run `warmups` turns of each peer, then `rounds` rounds in rotating order; the measurements by peer's name.
    `settle`: seconds between turns."""
    running: list[_Running] = []
    try:
        for peer in peers:
            say(f"starting {peer.name}")
            running.append(_Running(peer))
            for _ in range(warmups):
                running[-1].turn()
        values: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            first = number % len(running)
            for process in running[first:] + running[:first]:
                time.sleep(settle)
                values[process.peer.name].append(process.turn())
    finally:
        for process in running:
            process.stop()
    return {peer.name: Turns(peer, values[peer.name]) for peer in peers}


class _Running:
    """A peer's process. It speaks JSON lines on a pipe of its own, so that libraries may print what they like."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._log = tempfile.NamedTemporaryFile(prefix=f"bench-{peer.name.split()[0]}-", suffix=".log")  # noqa: SIM115
        read, write = os.pipe()
        environment = {**os.environ, **{k: v for k, v in peer.environment.items() if v is not None}}
        for name in (k for k, v in peer.environment.items() if v is None):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", peer.target, str(write)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[write],
            start_new_session=True,  # so that whatever the peer starts goes with it
        )
        os.close(write)
        self._answers: BinaryIO = os.fdopen(read, "rb", buffering=0)
        self._pending = b""
        try:
            self._say(json.dumps(dict(peer.settings)))
            self._answer(START_SECONDS, "starting")
        except BaseException:
            self.stop()
            raise

    def turn(self) -> dict[str, float]:
        self._say("go")
        return self._answer(TURN_SECONDS, "taking its turn")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: what it leaves to read says so
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self, seconds: float, doing: str) -> dict[str, float]:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._pending:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], left)
            data = self._answers.read(1 << 16) if ready else None
            if not data:
                what = "died" if ready else f"did not answer within {seconds:.0f} s"
                raise PeerFailed(f"{self.peer.name} {what} while {doing}. Its last words:\n{self._last_words()}")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def _last_words(self) -> str:
        with open(self._log.name, errors="replace") as log:
            return "".join(log.readlines()[-30:])

    def stop(self) -> None:
        """Ask the process to end, and end it and whatever it started if it does not."""
        assert self._process.stdin is not None
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.stdin.close()
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_SECONDS)
        self._answers.close()
        self._log.close()
