"""Ends a process on another machine of the cluster that hears nobody any more."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TIMEOUT_S = 60.0


def kill_process(node_id: str, pid: int, name: str) -> bool:
    """Kill a process of a node by force, if its title holds `name`; whether it was. False too where the node is gone:
    then so is the process."""
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=affinity)
    try:
        return ray.get(task.remote(pid, name), timeout=TIMEOUT_S)
    except ray.exceptions.RayError:
        return False


def _kill(pid: int, name: str) -> bool:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False  # it has ended, or this is no Linux, where a process id alone is too little to go by
    if name not in title:
        return False  # the id is another's by now
    os.kill(pid, signal.SIGKILL)
    return True
