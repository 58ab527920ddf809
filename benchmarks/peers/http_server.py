"""A server in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from benchmarks.peers.ray_serve_llm import NAME

START_S, STOP_S = 400.0, 60.0


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[tuple[str, float, subprocess.Popen]]:
    """Run `python -m command...`, which serves the model `NAME`; where it answers, the seconds until it did, and its
    first process. Raises `RuntimeError`, with the end of its log, if it does not."""
    url, began = f"http://127.0.0.1:{port}", time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that whatever it starts goes with it
        )
        try:
            _wait(url, process, log)
            yield url, time.perf_counter() - began, process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(url: str, process: subprocess.Popen, log: Any) -> None:
    deadline = time.monotonic() + START_S
    body = {"model": NAME, "prompt": [5] * 8, "max_tokens": 2}
    while time.monotonic() < deadline and process.poll() is None:
        try:
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)
            if answer.status_code == 200:
                return
            if answer.status_code == 400:  # it will not be different next time
                raise RuntimeError(f"A server refuses what it is asked: {answer.text}")
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    log.seek(0)
    raise RuntimeError(f"A server did not start:\n{log.read().decode(errors='replace')[-4000:]}")
