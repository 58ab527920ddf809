"""Judges mathematical answers with `math-verify`, in a process of its own.

Comparing formulas can take for ever, and the library's own time limit needs the main thread's alarm, which an actor
does not have. So a child process judges, a line of JSON a question, and is replaced when it takes too long.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading

from thornback.contracts import RewardError


class MathJudge:
    """`equal(text, answer)`: whether the final answer in `text` equals the reference answer. Safe to share between
    threads; the child process starts with the first question."""

    def __init__(self, seconds: float = 5.0, start_seconds: float = 60.0) -> None:
        self.seconds = seconds
        self.start_seconds = start_seconds
        self.num_timeouts = 0
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, text: str, answer: str) -> bool:
        """False also where judging took longer than `seconds` (counted in `num_timeouts`)."""
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            child.stdin.write(json.dumps({"text": text, "answer": answer}) + "\n")
            child.stdin.flush()
            reply = self._reply(child, self.seconds)
            if reply is None:
                self.num_timeouts += 1
                self._stop()
                return False
        return bool(json.loads(reply))

    def close(self) -> None:
        with self._lock:
            self._stop()

    def __reduce__(self) -> tuple:
        return MathJudge, (self.seconds, self.start_seconds)

    def __del__(self) -> None:
        self._stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "thornback.data.math_judge"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            )
            if self._reply(self._child, self.start_seconds) is None:
                self._stop()
                raise RewardError("The judge of mathematical answers did not start; check that math-verify is there.")
        return self._child

    @staticmethod
    def _reply(child: subprocess.Popen[str], seconds: float) -> str | None:
        """The child's next line, or None if it is late or gone."""
        assert child.stdout is not None
        ready, _, _ = select.select([child.stdout], [], [], seconds)
        return (child.stdout.readline() or None) if ready else None

    def _stop(self) -> None:
        child, self._child = getattr(self, "_child", None), None
        if child is not None:
            child.kill()
            child.wait(timeout=10)
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    stream.close()


def judge(text: str, answer: str) -> bool:
    """Whether the last answer in `text`, boxed or plain, equals `answer`."""
    from math_verify import parse, verify

    target = parse(f"\\boxed{{{answer}}}", parsing_timeout=None) or parse(answer, parsing_timeout=None)
    return bool(verify(target, parse(text, parsing_timeout=None), timeout_seconds=None))


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for a reply
    judge("1", "1")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            verdict = judge(question["text"], question["answer"])
        except Exception:  # a formula that the library cannot handle is no right answer
            verdict = False
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
