"""A run that is killed, in part or whole, ends with the weights of one that was not; bit for bit.

The run is one with all that can be lost: workers that remember answers, a draft head that learns beside the policy.
"""

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

from tests.train.tiny_run import comparable, drafted, events, trainer
from thornback.data import read_rollouts

pytestmark = pytest.mark.full
MODEL = "model/model.safetensors"


def rows(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def started(directory: Path, role: str) -> list[int]:
    """The processes that a role's first actor has lived in, the present one last."""
    found = [re.search(rf"^{role} 0 \(process (\d+) on", e["message"]) for e in events(directory)]
    return [int(match[1]) for match in found if match]


def killer(directory: Path, plan: list[tuple[int, str]]) -> threading.Thread:
    """Kills a role's process once so many steps are done, one after the other."""

    def kill():
        for steps, role in plan:
            while rows(directory) < steps or not started(directory, role):  # steps may begin without it
                time.sleep(0.002)
            os.kill(started(directory, role)[-1], signal.SIGKILL)
            while not any(e["kind"] == "actor_lost" and e["message"].startswith(role) for e in events(directory)):
                time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def test_actors_that_are_killed_change_nothing(ray_cluster, undisturbed, tiny_model, head, tmp_path):
    """A new worker recalls what the lost one had seen, and gets the present head; a lost draft learner costs the work
    in hand; a run that goes back to a checkpoint forgets the steps taken back, and goes back to its head, too."""
    plan = [(1, "draft learner"), (3, "reward model"), (4, "rollout worker"), (5, "learner rank"), (5, "draft learner")]
    thread = killer(tmp_path, plan)
    trainer(drafted(tiny_model("qwen3"), tmp_path, head)).train()
    thread.join(timeout=5)
    assert not thread.is_alive()
    lost = [e for e in events(tmp_path) if e["kind"] == "actor_lost"]
    roles = [e["message"].split(" (")[0].removesuffix(" 0") for e in lost]
    assert sorted(roles) == sorted(role for _, role in plan)
    # A draft learner is not waited for: its loss may be seen later.
    assert [role for role in roles if role != "draft learner"] == ["reward model", "rollout worker", "learner rank"]
    assert any("while refreshing the draft head of step" in e["message"] for e in lost)
    back = [e for e in events(tmp_path) if e["kind"] in ("actor_restarted", "resumed")]
    for before, after in zip(lost, back, strict=True):
        assert after["time"] - before["time"] < 60
    (resumed,) = (e["message"] for e in back if e["kind"] == "resumed")
    assert "going on after step 3" in resumed
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


def test_a_driver_that_is_stopped_and_killed_changes_nothing(ray_cluster, undisturbed, tiny_model, head, tmp_path):
    directory = tmp_path / "run"

    def start():
        return Driver(directory, drafted(tiny_model("qwen3"), directory, head), ray_cluster)

    first = start()
    assert first.signal_after(1, signal.SIGTERM) != 0
    saved = re.search(r"stopped and saved after step (\d)", first.log.read_text())
    assert saved is not None, first.log.read_text()
    assert (directory / "checkpoints" / f"step-{saved[1]}" / "state.json").exists()
    assert start().signal_after(5, signal.SIGKILL) == -signal.SIGKILL
    # What the head has not learned from yet lies in a checkpoint.
    assert (directory / "checkpoints" / "step-3" / "draft_rollouts.parquet").exists()
    start().finish()
    assert sum(e["kind"] == "resumed" for e in events(directory)) == 2
    assert comparable(directory) == comparable(undisturbed)
    evaluated = [json.loads(line)["step"] for line in (directory / "evaluation.jsonl").read_text().splitlines()]
    assert evaluated == [0, 0, 4, 4, 8, 8]
    for path in (MODEL, "checkpoints/step-8/draft.safetensors"):
        assert (directory / path).read_bytes() == (undisturbed / path).read_bytes()
    last = [read_rollouts(str(run / "rollouts" / "step-000008.parquet")) for run in (directory, undisturbed)]
    assert last[0].logprobs.tobytes() == last[1].logprobs.tobytes()
