"""The other end of the harness: one peer's process, `python -m benchmarks.worker module:function FD`, with its
settings as the first line of its input.

The function gets a `TurnTaker` and its settings; it makes itself ready and then works turn by turn:

    def peer(turns, size):
        ...
        while turns.wait():
            started = time.perf_counter()
            ...
            turns.report(seconds=time.perf_counter() - started)

Trainers that call back instead of being called do the same two calls in their callback.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


class TurnTaker:
    """A peer's view of the harness: it waits for its turn, and reports what the turn measured."""

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._ready = False
        os.set_inheritable(answers, False)  # or what this process starts would keep the pipe open after its death

    def wait(self) -> bool:
        """Block until it is this peer's turn; False: there is none any more. The first call says "ready"."""
        if not self._ready:
            self._ready = True
            self.report()
        return bool(sys.stdin.readline())

    def report(self, **values: float) -> None:
        os.write(self._answers, json.dumps(values).encode() + b"\n")


def main() -> None:
    target, answers = sys.argv[1:]
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(TurnTaker(int(answers)), **json.loads(sys.stdin.readline()))


if __name__ == "__main__":
    main()
