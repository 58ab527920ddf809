"""Runs programs that nobody has read, a model's answers: in a process without network, files, or other programs."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from thornback.contracts import RewardError

_CHILD = Path(__file__).with_name("sandbox_child.py")
_READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
_START_SECONDS = 30.0  # to be ready, on however busy a machine


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Of one program: seconds (of its own work, and on the clock), bytes of memory, of one file or stream that it
    writes, and of all its files."""

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 1 << 20
    folder_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a program. `exit_code` is negative for the signal that ended it, such as when memory or time was
    spent; `timed_out`: it was ended by the clock."""

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool


def run_python(code: str, stdin: str = "", limits: SandboxLimits | None = None) -> Ran:
    """Run a Python program, with the standard library, on a text.

    It has no network, sees no file but the interpreter's and those that it writes in a folder of its own, which is gone
    afterwards, starts no process, and knows nothing of this process's environment. Raises `RewardError` where this
    machine cannot confine it: that takes Linux 6.2 or later with user namespaces, on x86-64 or arm64.
    """
    limits = limits or SandboxLimits()
    heard, said = os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="sandbox-") as folder,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        request = {
            "code": code,
            "stdin": stdin,
            "folder": folder,
            "readable": [*_READABLE, sys.base_prefix],
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "folder_bytes": limits.folder_bytes,
        }
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD), str(said)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=errors,
                env={"LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"},
                cwd="/",
                pass_fds=(said,),
                start_new_session=True,
            )
        finally:
            os.close(said)
        timed_out = False
        try:
            assert child.stdin is not None
            child.stdin.write(json.dumps(request).encode())
            child.stdin.close()
            ready = select.select([heard], [], [], _START_SECONDS)[0] and os.read(heard, 5) == b"ready"
            if ready:
                try:
                    child.wait(limits.seconds)
                except subprocess.TimeoutExpired:
                    timed_out = True
        finally:
            os.close(heard)
            child.send_signal(signal.SIGKILL)
            child.wait()
        stdout, stderr = (_text(file, limits.file_bytes) for file in (out, errors))
    if not ready:
        why = stderr.strip().splitlines()[-1:] or ["it did not start"]
        raise RewardError(f"cannot confine programs on this machine ({why[0]}).")
    return Ran(stdout, stderr, child.returncode, timed_out)


def _text(file: object, most: int) -> str:
    file.seek(0)  # type: ignore[attr-defined]
    return file.read(most).decode("utf-8", "replace")  # type: ignore[attr-defined]
