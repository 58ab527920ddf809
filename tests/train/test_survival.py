"""A run that is killed, in part or whole, ends with the weights of one that was not; bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.train.tiny_run import comparable, events, settings, trainer

MODEL = "model/model.safetensors"


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tiny_model, tmp_path_factory):
    """A run without trouble: its directory."""
    directory = tmp_path_factory.mktemp("undisturbed")
    trainer(settings(tiny_model("qwen3"), directory)).train()
    return directory


def rows(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def process_of(directory: Path, role: str) -> int:
    """The process that a role's actor lives in now."""
    found = [re.search(rf"^{role} 0 \(process (\d+) on", e["message"]) for e in events(directory)]
    return int([m for m in found if m][-1][1])


def killer(directory: Path, plan: list[tuple[int, str]]) -> threading.Thread:
    """Kills a role's process once so many steps are done, one after the other."""

    def kill():
        for steps, role in plan:
            while rows(directory) < steps:
                time.sleep(0.002)
            os.kill(process_of(directory, role), signal.SIGKILL)
            while not any(e["kind"] == "actor_lost" and e["message"].startswith(role) for e in events(directory)):
                time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


@pytest.mark.full
def test_actors_that_are_killed_change_nothing(ray_cluster, undisturbed, tiny_model, tmp_path):
    plan = [(1, "rollout worker"), (3, "reward model"), (5, "learner rank")]
    thread = killer(tmp_path, plan)
    trainer(settings(tiny_model("qwen3"), tmp_path)).train()
    thread.join(timeout=5)
    assert not thread.is_alive()
    lost = [e for e in events(tmp_path) if e["kind"] == "actor_lost"]
    assert [role for _, role in plan] == [e["message"].split(" (")[0].removesuffix(" 0") for e in lost]
    back = [e for e in events(tmp_path) if e["kind"] in ("actor_restarted", "resumed")]
    for before, after in zip(lost, back, strict=True):
        assert after["time"] - before["time"] < 60
    assert "going on after step 3" in back[-1]["message"]
    assert comparable(tmp_path) == comparable(undisturbed)
    assert (tmp_path / MODEL).read_bytes() == (undisturbed / MODEL).read_bytes()


class Driver:
    """A driver process of its own on the test's cluster."""

    def __init__(self, directory: Path, values: dict, ray) -> None:
        values["run"]["address"] = ray.get_runtime_context().gcs_address
        path = directory.with_suffix(".json")
        path.write_text(json.dumps(values))
        self.log = directory.with_suffix(".log")
        self.directory = directory
        command = [sys.executable, "-m", "tests.train.tiny_run", str(path)]
        self.process = subprocess.Popen(command, stdout=self.log.open("a"), stderr=subprocess.STDOUT)

    def signal_after(self, steps: int, number: signal.Signals) -> int:
        """Send a signal once so many steps are done; the exit code."""
        deadline = time.monotonic() + 180
        while rows(self.directory) < steps:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def finish(self) -> None:
        assert self.process.wait(timeout=180) == 0, self.log.read_text()


def test_a_killed_drivers_run_goes_on_in_another(ray_cluster, undisturbed, tiny_model, tmp_path):
    directory = tmp_path / "run"
    driver = Driver(directory, settings(tiny_model("qwen3"), directory), ray_cluster)
    assert driver.signal_after(5, signal.SIGKILL) == -signal.SIGKILL
    trainer(settings(tiny_model("qwen3"), directory)).train()
    check_nothing_changed(directory, undisturbed, num_resumed=1)


@pytest.mark.full
def test_a_driver_that_is_stopped_and_killed_changes_nothing(ray_cluster, undisturbed, tiny_model, tmp_path):
    directory = tmp_path / "run"

    def start():
        return Driver(directory, settings(tiny_model("qwen3"), directory), ray_cluster)

    first = start()
    assert first.signal_after(1, signal.SIGTERM) != 0
    saved = re.search(r"stopped and saved after step (\d)", first.log.read_text())
    assert saved is not None, first.log.read_text()
    assert (directory / "checkpoints" / f"step-{saved[1]}" / "state.json").exists()
    assert start().signal_after(5, signal.SIGKILL) == -signal.SIGKILL
    start().finish()
    check_nothing_changed(directory, undisturbed, num_resumed=2)


def check_nothing_changed(directory: Path, undisturbed: Path, num_resumed: int) -> None:
    assert sum(e["kind"] == "resumed" for e in events(directory)) == num_resumed
    assert comparable(directory) == comparable(undisturbed)
    assert (directory / MODEL).read_bytes() == (undisturbed / MODEL).read_bytes()
    evaluated = [json.loads(line)["step"] for line in (directory / "evaluation.jsonl").read_text().splitlines()]
    assert evaluated == [0, 0, 4, 4, 8, 8]
