"""Killing a process that hangs, by way of Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from thornback.serve.fencing import kill_process


def test_only_the_process_that_is_meant_is_killed(ray_cluster):
    node = ray_cluster.get_runtime_context().get_node_id()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "the-replica"])
    try:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.2)
        assert not kill_process(node, process.pid, "another")
        assert not kill_process("0" * 56, process.pid, "the-replica")
        assert process.poll() is None
        assert kill_process(node, process.pid, "the-replica")
        assert process.wait(10) == -signal.SIGKILL
        assert not kill_process(node, process.pid, "the-replica")
    finally:
        process.kill()
