"""The sandbox: programs do their work, and get out by no way that we know."""

from __future__ import annotations

import os
import socket
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from thornback.contracts import Completion, Prompt, RewardError
from thornback.data import ArithmeticTask, CodeReward, RuleScorer, SandboxLimits, as_reward, run_python
from thornback.data import sandbox as sandbox_module

LIMITS = SandboxLimits(seconds=20.0, memory_bytes=256 << 20, file_bytes=1 << 16, folder_bytes=1 << 20)
QUICK = replace(LIMITS, seconds=1.0)


def ran(code: str, stdin: str = "", limits: SandboxLimits = LIMITS):
    return run_python(textwrap.dedent(code), stdin, limits)


@pytest.fixture(scope="module")
def why_not() -> str:
    """Why this machine confines nothing, such as a container that forbids namespaces; "" where it does."""
    try:
        run_python("")
    except RewardError as error:
        return str(error)
    return ""


@pytest.fixture(autouse=True)
def _confines(why_not, request) -> None:
    if why_not and "nothing_runs" not in request.node.name:
        pytest.skip(why_not)


def test_a_program_reads_and_writes():
    assert ran("print(sum(map(int, input().split())))", "1 2 3").stdout == "6\n"
    assert ran("import sys; print('grüß', file=sys.stderr); sys.exit(3)").stderr == "grüß\n"
    assert ran("import sys; sys.exit(3)").exit_code == 3
    assert "ZeroDivisionError" in ran("1 / 0").stderr
    assert "SyntaxError" in ran("1 +").stderr
    assert ran("if __name__ == '__main__': print(__import__('sys').argv)").stdout == "['program.py']\n"


def test_the_standard_library_works():
    found = ran(
        """
        import asyncio, bisect, collections, dataclasses, decimal, fractions, heapq, itertools, json, math, random, re
        import string, tempfile, threading, zlib
        thread = threading.Thread(target=lambda: print(json.dumps({"a": math.pi})))
        thread.start(); thread.join()
        asyncio.run(asyncio.sleep(0))
        open("mine.txt", "w").write("mine")
        print(open("mine.txt").read())
        """
    )
    assert (found.exit_code, found.stdout) == (0, '{"a": 3.141592653589793}\nmine\n'), found.stderr


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd').read()",
        "open(HERE).read()",
        "import os; os.listdir('/')",
        "import os; os.listdir('/proc')",
        "open('/proc/self/environ').read()",
        "open('/proc/1/cmdline').read()",
        "open('/tmp/escaped', 'w')",
        "open('/dev/shm/escaped', 'w')",
        "import os; os.symlink('/etc/passwd', 'link'); open('link').read()",
        "import os; os.link('/usr/lib/os-release', 'mine')",
        "import os; os.chdir('/root'); os.listdir('.')",
        "import os; os.mkfifo('/tmp/fifo')",
        "import os; os.remove(HERE)",
    ],
)
def test_files_are_out_of_reach(code):
    found = ran(f"HERE = {__file__!r}\n{code}")
    assert found.exit_code == 1
    assert "Error" in found.stderr
    assert os.path.exists(__file__)
    assert not os.path.exists("/tmp/escaped")


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.fork()",
        "import subprocess; subprocess.run(['/bin/ls'])",
        "import os; os.execv('/bin/ls', ['ls'])",
        "import os; os.posix_spawn('/bin/ls', ['ls'], {})",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        "import os; assert os.system('true') == 0",
        "import os; os.kill(1, 0)",
        "import os; os.kill(PARENT, 9)",
        "import os; os.killpg(0, 9)",
        "import signal; signal.pidfd_send_signal(0, 9)",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
        "import urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{PORT}')",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
        "import ctypes; assert ctypes.CDLL(None).mount(b'none', b'.', b'tmpfs', 0, None) == 0",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, PARENT, 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(425, 8, b'0' * 120) >= 0",  # io_uring_setup
        "import ctypes; assert ctypes.CDLL(None).syscall(435, b'0' * 88, 88) >= 0",  # clone3
        "import ctypes; assert ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) == 0",  # no filter again
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))",
        "import os; os.setuid(12345)",
        "import os; os.chroot('.')",
    ],
)
def test_nothing_can_be_started_or_reached(code):
    with socket.create_server(("127.0.0.1", 0)) as server:
        called = threading.Event()

        def listen() -> None:
            try:
                server.accept()
                called.set()
            except OSError:
                pass

        threading.Thread(target=listen, daemon=True).start()
        found = ran(f"PARENT, PORT = {os.getpid()}, {server.getsockname()[1]}\n{code}")
        time.sleep(0.05)
        assert not called.is_set()
    assert found.exit_code != 0
    assert not found.timed_out


def test_the_environment_is_not_known(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    found = ran("import os; print(dict(os.environ), os.getcwd())")
    assert "hunter2" not in found.stdout
    assert found.exit_code == 0


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10**9)",
        "x = []\nwhile True: x.append(' ' * 10**6)",
        "f = open('f', 'w')\nwhile True: f.write('x' * 10**5); f.flush()",
        "for i in range(100): open(str(i), 'w').write('x' * 60000)",
        "while True: print('x' * 10**5)",
        "import os\nwhile True: os.open('.', 0)",
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "import os; os.abort()",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_what_takes_too_much_ends(code):
    began = time.monotonic()
    found = ran(code, limits=QUICK)
    assert found.exit_code != 0
    assert len(found.stdout) <= QUICK.file_bytes
    assert time.monotonic() - began < 60  # on however busy a machine


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal, time; [signal.signal(s, lambda *_: None) for s in (2, 15, 24)]\nwhile True: pass",
        "import threading, time; [threading.Thread(target=time.sleep, args=(1000,)).start() for _ in range(5)]",
    ],
)
def test_time_runs_out(code):
    began = time.monotonic()
    found = ran(code, limits=QUICK)
    assert found.exit_code == -9
    assert 0.9 < time.monotonic() - began < 60  # on however busy a machine


def test_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    for code in ("open('x', 'w').write('x')", "while True: pass", "1 / 0"):
        ran(code, limits=QUICK)
    assert os.listdir(tmp_path) == []
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


def test_where_nothing_can_be_confined_nothing_runs(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text(sandbox_module._CHILD.read_text().replace("version < 3", "version < 300"))
    monkeypatch.setattr(sandbox_module, "_CHILD", broken)
    with pytest.raises(RewardError, match="cannot confine programs on this machine"):
        ran("print('ran')")


def answer(code: str, tests: object) -> Completion:
    prompt = Prompt("p", ({"role": "user", "content": "Add."},), None, {"tests": tests} if tests else {})
    return Completion(prompt, f"First:\n```python\nprint(0)\n```\nBetter:\n```python\n{code}\n```\n", 9, "stop")


def test_code_is_worth_what_it_passes():
    tests = [{"input": "1 2", "output": "3\n"}, {"input": "5 5", "output": "10"}]
    right, half, wrong = "print(sum(map(int, input().split())))", "print(3)", "import os; os._exit(0)"
    completions = [answer(code, tests) for code in (right, half, wrong)]
    completions += [answer(right, None), Completion(completions[0].prompt, "no code", 2, "stop")]
    assert CodeReward(seconds=20.0).score_all(completions) == [1.0, 0.5, 0.0, None, 0.0]
    assert CodeReward(seconds=20.0, all_or_nothing=True).score_all(completions) == [1.0, 0.0, 0.0, None, 0.0]
    reward = as_reward("passes", "thornback.data:CodeReward", options={"seconds": 20.0})
    assert RuleScorer(ArithmeticTask(), [reward]).score(completions[:2])["passes"].tolist() == [1.0, 0.5]
