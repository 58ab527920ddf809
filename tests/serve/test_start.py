"""A server started from Python, in the Ray that runs already; new weights while it answers; Ray Serve's own files."""

from __future__ import annotations

import time

import httpx
import numpy as np
import pytest

from thornback.contracts import ConfigError
from thornback.serve import ServeConfig, app, start
from thornback.serve.application import model_name


def ask(server, **more):
    body = {"model": server.model_name, "prompt": "weights", "max_tokens": 20, "temperature": 0, **more}
    return httpx.post(f"{server.base_url}/completions", json=body, trust_env=False, timeout=60)


@pytest.mark.full
def test_a_server_in_a_ray_that_runs(ray_cluster, byte_model, tmp_path):
    from ray import serve as ray_serve

    from thornback.contracts import WeightView
    from thornback.engine import copy_parameters, load_model

    run = tmp_path / "my-run"
    run.mkdir()
    (run / "model").symlink_to(byte_model)
    with start(run, port=0, threads_per_replica=1, num_replicas=2) as server:
        assert ray_cluster.is_initialized()
        before = ask(server)
        assert before.headers["x-thornback-weight-version"] == "0"

        view = copy_parameters(load_model(byte_model))
        other = WeightView(view.buffer.view(np.float32)[::-1].copy().view(np.uint8), view.index)
        handle = ray_serve.get_deployment_handle("Replica", server.config.app_name)
        deadline = time.monotonic() + 30  # a new handle hears of the replicas one by one
        while len(handle.broadcast("load").results(timeout_s=30)) < 2:
            assert time.monotonic() < deadline
        handle.broadcast("load_weights", other, 7).results(timeout_s=60)
        after = [ask(server) for _ in range(4)]
        assert {answer.headers["x-thornback-weight-version"] for answer in after} == {"7"}
        assert {answer.json()["system_fingerprint"] for answer in after} == {"weights-7"}
        assert after[0].json()["choices"][0]["text"] != before.json()["choices"][0]["text"]
        health = httpx.get(f"{server.url}/health", trust_env=False).json()
        assert health == {"status": "ok", "model": "my-run", "weight_version": 7}

        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"listens on port {port}, not {port + 1}"):
            start(run, port=port + 1)
        assert ask(server).status_code == 200  # which has ended nothing
    assert ray_cluster.is_initialized()  # it was there before
    with pytest.raises(httpx.ConnectError):
        ask(server)


def test_the_builder_of_serve_deploy(byte_model):
    built = app({"model": str(byte_model), "num_replicas": 3, "limits": {"max_queued": 5}})
    assert type(built).__name__ == "Application"
    with pytest.raises(ConfigError, match="did you mean num_replicas"):
        app({"model": str(byte_model), "num_replica": 3})


def test_names(byte_model, tmp_path):
    assert model_name(str(byte_model)) == "byte-model"
    (tmp_path / "model").mkdir()
    assert model_name(str(tmp_path / "model")) == tmp_path.name
    assert model_name(str(tmp_path)) == tmp_path.name
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_settings_from_python_are_checked(byte_model):
    with pytest.raises(ConfigError, match="did you mean port"):
        start(byte_model, prot=1)
    assert ServeConfig(model="m").host == "127.0.0.1"
