"""A cluster of several nodes under Ray's own autoscaler, all on this machine: training and serving share it, it grows
for them, a node is killed under both, and it shrinks when they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import ray
import yaml

from tests.serve.conftest import make_byte_model
from tests.thornback.test_submit import ROOT, free_ports, quiet_environment, run_in, wait_for
from tests.train.tiny_run import events

STEPS = 300
SAME_MACHINE = ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check")
HEAD_ID = "f" * 51 + "00000"
NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"  # how Ray's provider for tests tells its nodes apart
AUTOSCALER = {
    "cluster_name": "test",
    "max_workers": 4,
    "idle_timeout_minutes": 0.15,
    "upscaling_speed": 10.0,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 2, "object_store_memory": 100_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 4,
        },
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "file_mounts": {},
    **{name: [] for name in ("cluster_synced_files", "initialization_commands", "setup_commands")},
    **{f"{who}_{what}_commands": [] for who in ("head", "worker") for what in ("setup", "start_ray")},
}
RECIPE = {
    "run": {"steps": STEPS, "timeout_seconds": 120, "save_rollouts": True},
    "model": {"build": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}},
    "data": {"prompts_per_step": 4},
    "algorithm": {"estimator": "dvao", "kl_weight": 1e-3},
    "rollout": {
        "max_staleness": 1,
        "samples_per_prompt": 4,
        "max_tokens": 16,
        "num_workers": 2,
        "num_cpus": 1,
        "num_threads": 1,
    },
    "learner": {"num_cpus": 1, "num_threads": 1},
    "evaluation": {"every": 0},
    "checkpoint": {"every": 20},
}


class Head:
    """The head node, without CPUs of its own; other nodes come and go. `address` is the dashboard's."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "ray.log"
        self.directory = directory
        gcs, dashboard, *others, metrics = free_ports(6)
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.gcs, self.address = f"{ray.util.get_node_ip_address()}:{gcs}", f"http://127.0.0.1:{dashboard}"
        config = directory / "autoscaler.yaml"
        provider = {"type": "fake_multinode", "gcs_address": self.gcs, **dict.fromkeys(SAME_MACHINE, True)}
        config.write_text(yaml.safe_dump(AUTOSCALER | {"provider": provider}))
        bin_directory = Path(sys.executable).parent
        environment = quiet_environment() | {
            "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
        }
        names = ("--dashboard-agent-listen-port", "--ray-client-server-port", "--runtime-env-agent-port")
        self.process = subprocess.Popen(
            [
                *(bin_directory / "ray", "start", "--head", "--block", "--num-cpus", "0", "--disable-usage-stats"),
                *("--autoscaling-config", config, "--port", gcs, "--dashboard-port", dashboard),
                *("--metrics-export-port", metrics),
                *("--object-store-memory", "200000000", "--temp-dir", directory / "r"),
                *(part for pair in zip(names, others, strict=True) for part in pair),
            ],
            env=environment,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def nodes(self) -> dict[str, psutil.Process]:
        """The raylets of the nodes that the autoscaler has started, by node id."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            with suppress(psutil.Error):
                command = process.info["cmdline"] or [""]
                if command[0].endswith("/raylet") and any(self.gcs in part for part in command):
                    node = process.environ().get(NODE_ID)
                    if node and node != HEAD_ID:
                        found[node] = process
        return found

    def stop(self) -> None:
        nodes = list(self.nodes().values())
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        for node in nodes:
            kill(node)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def kill(node: psutil.Process) -> None:
    """A whole node: its raylet, and everything that it has started."""
    with suppress(psutil.Error):
        processes = [node, *node.children(recursive=True)]
        for process in processes:
            with suppress(psutil.Error):
                process.kill()


def until(condition, seconds: float, what: str):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value


@pytest.fixture
def head(tmp_path_factory):
    import shutil
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix="tb", dir="/tmp"))  # sockets live there, and their paths must be short
    started = Head(directory)
    try:
        wait_for(started.address, started.process, started.log)
        yield started
    finally:
        started.stop()
        shutil.rmtree(directory, ignore_errors=True)


def exported(url: str) -> str:
    """Ray's Prometheus page, once a run's figures are on it."""
    page = httpx.get(url, trust_env=False, timeout=10).text
    return page if 'metric="tokens_per_second"' in page else ""


def check_dashboard(page: str) -> None:
    """What the dashboard of training asks for is on Ray's Prometheus page."""
    shown = set(re.findall(r'ray_thornback_training{[^}]*metric="([^"]+)"', page))
    panels = json.loads((ROOT / "deploy" / "grafana-training.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    ours = [re.search(r'metric(=~?)"([^"]+)"', text) for text in asked if "ray_thornback_training" in text]
    assert len(ours) > 8
    for how, what in (match.groups() for match in ours if match):
        pattern = what if how == "=~" else re.escape(what)
        assert any(re.fullmatch(pattern, name) for name in shown), f"{what} is not among {sorted(shown)}"


class Client(threading.Thread):
    """Asks again and again, and notes what does not answer."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.ended, self.answers, self.failures = url, threading.Event(), 0, []

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "a b", "max_tokens": 4}
        with httpx.Client(trust_env=False, timeout=60) as http:
            while not self.ended.wait(0.3):
                try:
                    answer = http.post(f"{self.url}/v1/completions", json=body)
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.answers += 1


@pytest.mark.full
@pytest.mark.timeout(480)
def test_a_node_is_lost_under_training_and_serving(head, tmp_path):
    assert not head.nodes()
    model = make_byte_model(tmp_path / "tiny")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "thornback", "serve", model, f"ray_address={head.gcs}", "--port", "0"),
            *("served_model_name=tiny", "num_replicas=2", "gateway_replicas=2", "threads_per_replica=1"),
            *("engine.kv_cache_memory_bytes=50000000", "start_timeout_s=240"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=quiet_environment() | {"PYTHONUNBUFFERED": "1"},
    )
    said: list[str] = []
    threading.Thread(target=lambda: said.extend(server.stdout), daemon=True).start()
    try:
        found = until(lambda: re.search(r"answers at (http://\S+)/v1", "".join(said)), 240, "the server did not start")
        client = Client(found[1])
        client.start()
        alone = len(head.nodes())
        assert alone >= 1, "the cluster did not grow for the server"

        run = tmp_path / "run"
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE | {"run": RECIPE["run"] | {"dir": str(run)}}))
        # No working directory: nodes of one machine would share, and delete, the place where Ray unpacks it.
        command = [Path(sys.executable).with_name("ray"), "job", "submit", "--address", head.address, "--no-wait"]
        submitted = run_in("/", *command, "--", "python", "-m", "thornback", "train", str(recipe))
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr

        metrics = run / "metrics.jsonl"

        def steps() -> int:
            return len(metrics.read_text().splitlines()) if metrics.exists() else 0

        until(lambda: steps() >= 7, 200, f"the job did not get going: {submitted.stdout}")
        check_dashboard(until(lambda: exported(head.metrics), 60, "the run shows no metrics"))
        nodes = head.nodes()
        assert len(nodes) > alone, "the cluster did not grow for the job"
        started = [e["message"] for e in events(run) if e["kind"] == "actor_started"]
        worker = next(int(m[1]) for text in started if (m := re.match(r"rollout worker 0 \(process (\d+) on", text)))
        (home,) = [node for node in nodes.values() if worker in (p.pid for p in node.children(recursive=True))]
        kill(home)
        until(lambda: (run / "summary.json").exists(), 240, "the run did not end")

        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        assert sum(row["num_rollouts"] for row in rows) == STEPS * 16
        assert any(e["kind"] == "actor_lost" for e in events(run))
        client.ended.set()
        client.join(70)
        assert client.answers > 20
        assert not client.failures, client.failures[:3]
        server.send_signal(signal.SIGINT)
        server.wait(60)
        until(lambda: not head.nodes(), 90, "the cluster did not shrink")
    finally:
        server.kill()
