"""Jobs on a Ray cluster: what is sent, and that it runs."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from thornback.cli import submit
from thornback.contracts import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_recipe_is_named_by_its_place_in_the_working_directory(tmp_path):
    recipe = tmp_path / "my recipes" / "a.yaml"
    command = submit.entrypoint_of(str(recipe), ["run.name=a b"], str(tmp_path))
    assert command == "python -m thornback train 'my recipes/a.yaml' 'run.name=a b'"
    with pytest.raises(ConfigError, match="outside the job's working directory"):
        submit.entrypoint_of(str(recipe), [], str(tmp_path / "elsewhere"))


def test_thornback_travels_with_a_directory_that_does_not_hold_it(tmp_path):
    assert submit.runtime_environment(tmp_path) == {
        "working_dir": str(tmp_path),
        "py_modules": [str(ROOT / "thornback")],
    }
    assert submit.runtime_environment(ROOT) == {"working_dir": str(ROOT)}


RECIPE = """
run: {name: job, steps: 2}
model: {build: {hidden_size: 32, num_hidden_layers: 1, intermediate_size: 64}}
data: {prompts_per_step: 2}
algorithm: {estimator: dvao}
rollout: {samples_per_prompt: 2, max_tokens: 8, num_threads: 1}
learner: {num_threads: 1}
evaluation: {every: 0}
"""
PORT_OPTIONS = (
    *("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--dashboard-agent-grpc-port"),
    *("--ray-client-server-port", "--metrics-export-port", "--runtime-env-agent-port"),
    *("--node-manager-port", "--object-manager-port"),
)


def free_ports(count):
    """Ports that were free a moment ago."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [str(s.getsockname()[1]) for s in sockets]


@pytest.fixture(scope="module")
def cluster():
    """The dashboard's address of a Ray cluster that `ray start` made, with this Python first on its path."""
    directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets live there, and their paths must be short
    ports = free_ports(len(PORT_OPTIONS))
    bin_directory = Path(sys.executable).parent
    environment = {**quiet_environment(), "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}"}
    with (directory / "ray.log").open("w") as log:
        head = subprocess.Popen(
            [
                *(bin_directory / "ray", "start", "--head", "--block", "--num-cpus", "2", "--disable-usage-stats"),
                *("--temp-dir", directory, "--object-store-memory", "200000000"),
                *(part for pair in zip(PORT_OPTIONS, ports, strict=True) for part in pair),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_for(address, head, directory / "ray.log")
        yield address
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)  # whatever of its own group is left
        shutil.rmtree(directory, ignore_errors=True)


def wait_for(address, head, log, seconds=120):
    """Until the cluster takes jobs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and head.poll() is None:
        listing = [Path(sys.executable).with_name("ray"), "job", "list", "--address", address]
        if run_in("/", *listing).returncode == 0:
            return
        time.sleep(0.5)
    raise AssertionError(f"the cluster did not start in {seconds} s:\n{log.read_text()}")


@pytest.fixture
def project(tmp_path):
    """A copy of the repository as a clone has it, with a recipe that writes its run to `tmp_path`."""
    not_code = shutil.ignore_patterns(".*_cache", ".venv*", ".git", "runs", "build", "__pycache__")
    directory = tmp_path / "project"
    shutil.copytree(ROOT, directory, symlinks=True, ignore=not_code)
    (directory / "recipe.yaml").write_text(RECIPE)
    return directory


def quiet_environment():
    """No cluster of the surroundings, and no token: a local `ray.init` elsewhere leaves one in the home directory."""
    return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_AUTH_MODE": "disabled"}


def run_in(directory, *command):
    return subprocess.run(
        command, cwd=directory, env=quiet_environment(), capture_output=True, text=True, timeout=280, check=False
    )


@pytest.mark.full
def test_a_submitted_recipe_trains_on_the_cluster(cluster, project, tmp_path):
    done = run_in(
        project,
        sys.executable,
        "-m",
        "thornback",
        "submit",
        "recipe.yaml",
        f"run.dir={tmp_path}/run",
        "--address",
        cluster,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.full
def test_plain_ray_job_submit_works_too(cluster, project, tmp_path):
    command = ["python", "-m", "thornback", "train", "recipe.yaml", f"run.dir={tmp_path}/run"]
    ray = Path(sys.executable).with_name("ray")
    done = run_in(project, ray, "job", "submit", "--address", cluster, "--working-dir", ".", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.full
def test_a_job_that_fails_says_so(cluster, project):
    (project / "mine.py").write_text("def judge(completion):\n    raise KeyError('answer')\n")
    done = run_in(
        *(project, sys.executable, "-m", "thornback", "submit", "recipe.yaml", "rewards.mine.function=mine:judge"),
        *("--address", cluster),
    )
    assert done.returncode == 2
    assert re.search(r"^thornback: .*reward mine.*KeyError", done.stdout, re.MULTILINE), "the job's own sentence"
    assert "ended as FAILED" in done.stderr
