"""Does anything grow? Training and serving on one Ray, for an hour: memory, files and processes, over time.

A run like the demo's trains without an end, its rollouts ahead of the learner by at most 2 versions, with checkpoints
and evaluations; beside it a server answers two clients. Every ten seconds: of each process its own memory (USS: pages
that nobody shares, since all map the object store) and its open files; of the machine, what the object store holds, the
files in /dev/shm, and the processes of this Ray.

The first fifth is warm-up. `memory_per_hour`: the steepest slope of a process's memory after it (least squares), as a
share of what it has; `object_store_per_hour` likewise, of its capacity; `files_per_hour` and `processes_per_hour`, more
of them. Of what is flat, all are about 0. The rows give each role's.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import yaml

from benchmarks.experiment_tasks import start as warm_start
from benchmarks.results import Results, run
from thornback.train.cluster import cluster

SECONDS, QUICK_SECONDS = 3600.0, 150.0
EVERY, WARM_UP = 10.0, 0.2
# Ray's GCS remembers so many tasks: by default 100,000, which fill it only in most of the hour.
REMEMBERED_TASKS = {"RAY_task_events_max_num_task_in_gcs": "20000"}


def recipe(model: str, directory: Path, address: str) -> dict[str, Any]:
    return {
        "run": {"dir": str(directory), "steps": 1_000_000, "address": address},
        "model": {"path": model},
        "task": {"name": "arithmetic", "options": {"num_train": 480, "num_test": 64, "budget": 34}},
        "data": {"prompts_per_step": 8},
        "rollout": {"max_staleness": 2, "num_threads": 1, "max_tokens": 48, "engine_options": {"max_model_len": 144}},
        "algorithm": {"estimator": "dvao", "kl_weight": 1e-3},
        "learner": {"num_threads": 1, "learning_rate": 1e-5},
        "evaluation": {"every": 200, "num_prompts": 64, "greedy": False},
        "checkpoint": {"every": 100},
    }


@contextmanager
def clients(url: str, count: int) -> Iterator[list[int]]:
    """So many ask without a pause; yields how often each was answered."""
    ended, answered = threading.Event(), [0] * count
    body = {"model": "soak", "max_tokens": 32, "messages": [{"role": "user", "content": "47+38=?"}]}

    def ask(number: int) -> None:
        with httpx.Client(trust_env=False, timeout=60) as http:
            while not ended.is_set():
                http.post(f"{url}/chat/completions", json={**body, "seed": answered[number]}).raise_for_status()
                answered[number] += 1

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    yield answered
    ended.set()
    for thread in threads:
        thread.join(60)


def role_of(process: psutil.Process) -> str:
    """What it is for: an actor's class, or a program's name."""
    command = process.cmdline() or [process.name()]
    if command[0].startswith("ray::"):
        return re.split(r"[.:(#]", command[0].removeprefix("ray::"))[0]
    words = [Path(word).name for word in command[:4] if not word.startswith("-")]
    return next((word for word in words if not word.startswith("python")), words[0])


def sample(ours: psutil.Process) -> dict[str, Any]:
    memory, files = {}, 0
    processes = ours.children(recursive=True)
    for process in processes:
        with suppress(psutil.Error):
            memory[f"{role_of(process)} {process.pid}"] = process.memory_full_info().uss / 1e6
            files += process.num_fds()
    total, free = ray.cluster_resources(), ray.available_resources()
    return {
        "time": time.monotonic(),
        "memory": memory,
        "files": files,
        "processes": len(processes),
        "object_store": 1.0 - free.get("object_store_memory", 0.0) / total["object_store_memory"],
        "shm": len(list(Path("/dev/shm").iterdir())),
    }


def slope(times: np.ndarray, values: list[float]) -> float:
    """Per hour."""
    return float(np.polyfit(times / 3600.0, values, 1)[0])


def measure(quick: bool, say: Callable[[str], None]) -> Results:
    from thornback.serve import start

    seconds = QUICK_SECONDS if quick else SECONDS
    model = warm_start("arithmetic", 0, quick)
    samples = []
    os.environ.update(REMEMBERED_TASKS)
    with tempfile.TemporaryDirectory() as temporary, cluster(None):
        model.make(say)
        address = ray.get_runtime_context().gcs_address
        path = Path(temporary, "recipe.yaml")
        path.write_text(yaml.safe_dump(recipe(model.model, Path(temporary, "run"), address)))
        with start(model.model, port=0, served_model_name="soak", threads_per_replica=1) as server:
            command = [sys.executable, "-m", "thornback", "train", str(path)]
            training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            metrics = Path(temporary, "run", "metrics.jsonl")
            while not metrics.exists():
                if training.poll() is not None:
                    raise RuntimeError(training.stderr.read() if training.stderr else "training ended")
                time.sleep(1)
            with clients(server.base_url, 2) as answered:
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    samples.append(sample(psutil.Process()))
                    if len(samples) % 30 == 0:
                        say(f"{(time.monotonic() - began) / 60:.0f} min: {sum(answered)} answers")
                    if training.poll() is not None:
                        raise RuntimeError(f"training ended: {training.stderr.read() if training.stderr else ''}")
                    time.sleep(EVERY)
            training.send_signal(signal.SIGTERM)
            training.wait(120)
            steps = metrics.read_text().count("\n")
    return results_of(samples, steps, sum(answered))


def results_of(samples: list[dict[str, Any]], steps: int, answers: int) -> Results:
    results = Results("soak")
    kept = samples[int(len(samples) * WARM_UP) :]
    times = np.array([s["time"] for s in kept]) - kept[0]["time"]
    lived = [name for name in kept[0]["memory"] if all(name in s["memory"] for s in kept)]
    growth, by_role = {}, defaultdict(list)
    for name in lived:
        values = [s["memory"][name] for s in kept]
        growth[name] = slope(times, values) / float(np.mean(values))
        by_role[name.rpartition(" ")[0]].append((slope(times, values), float(np.mean(values))))
    for role, found in sorted(by_role.items(), key=lambda item: -max(s for s, _ in item[1])):
        slopes, means = zip(*found, strict=True)
        results.rows.append(
            {"name": role, "processes": len(found), "megabytes": sum(means), "megabytes_per_hour": max(slopes)}
        )
    machine = {key: [s[key] for s in kept] for key in ("object_store", "files", "processes", "shm")}
    results.rows += [
        {"name": key, "first": values[0], "last": values[-1], "largest": max(values), "per_hour": slope(times, values)}
        for key, values in machine.items()
    ]
    minutes = (samples[-1]["time"] - samples[0]["time"]) / 60
    results.rows.append({"name": "work", "minutes": minutes, "steps": steps, "answers": answers})
    results.ratios = {
        "memory_per_hour": max(growth.values()),
        "object_store_per_hour": slope(times, machine["object_store"]),
        "files_per_hour": slope(times, machine["files"]),
        "processes_per_hour": slope(times, machine["processes"]),
        "shm_files_per_hour": slope(times, machine["shm"]),
    }
    results.plot = lambda path: draw(samples, by_role, path)
    return results


def draw(samples: list[dict[str, Any]], roles: dict[str, Any], path: Path) -> None:
    """Memory by role, over minutes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=colormaps["tab20"](range(20)))
    minutes = [(s["time"] - samples[0]["time"]) / 60 for s in samples]
    for role in roles:
        memory = [sum(v for name, v in s["memory"].items() if name.rpartition(" ")[0] == role) for s in samples]
        if max(memory) > 50:
            axes.plot(minutes, memory, label=role, linewidth=1)
    axes.set(xlabel="minutes", ylabel="memory of its own, MB", ylim=(0, None))
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run("soak", measure)
