"""Ctrl-C in the middle of a run: it saves, leaves with 130, and the same command goes on."""

import json
import signal
import subprocess
import sys
import time

import pytest

RECIPE = """
run: {name: long, dir: run, steps: 400}
model: {build: {hidden_size: 32, num_hidden_layers: 1, intermediate_size: 64}}
data: {prompts_per_step: 2}
algorithm: {estimator: dvao}
rollout: {samples_per_prompt: 2, max_tokens: 8, num_threads: 1}
learner: {num_threads: 1}
evaluation: {every: 0}
checkpoint: {every: 1000}
"""


def steps_in(directory):
    path = directory / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.full
def test_ctrl_c_saves_and_leaves_and_the_same_command_goes_on(tmp_path, cli_environment):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "thornback", "train", "recipe.yaml"]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=cli_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(steps_in(tmp_path)) < 3 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    assert "interrupted" in err
    assert "Traceback" not in err
    done = steps_in(tmp_path)[-1]
    assert 3 <= done < 400
    assert (tmp_path / "run" / "checkpoints" / f"step-{done}").is_dir(), "what was learned is kept"

    again = subprocess.run(
        [*command, f"run.steps={done + 2}"],
        cwd=tmp_path, env=cli_environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps_in(tmp_path) == list(range(1, done + 3))


@pytest.mark.full
def test_ctrl_c_in_a_warm_start_leaves_as_everywhere(tmp_path, cli_environment):
    (tmp_path / "recipe.yaml").write_text(RECIPE + "warm_start: {steps: 100000, batch_size: 4}\n")
    running = subprocess.Popen(
        [sys.executable, "-m", "thornback", "train", "recipe.yaml"],
        cwd=tmp_path,
        env=cli_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while (
        not list((tmp_path / "run").glob(".warm*metrics*")) and running.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, out + err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "warm").exists(), "half a warm start is none"
