"""A server started from Python, in the Ray that runs already; new weights while it answers; Ray Serve's own files."""

from __future__ import annotations

import os

import httpx
import pytest

from thornback.contracts import ConfigError
from thornback.serve import ServeConfig, app, start
from thornback.serve.application import model_name


def ask(server, **more):
    body = {"model": server.model_name, "prompt": "weights", "max_tokens": 20, "temperature": 0, **more}
    return httpx.post(f"{server.base_url}/completions", json=body, trust_env=False, timeout=60)


@pytest.mark.full
def test_a_server_in_a_ray_that_runs(ray_cluster, byte_model, tmp_path):
    from transformers import AutoTokenizer

    from thornback.train.build import build_model

    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 8192}
    newer = build_model(tmp_path / "newer", tokenizer, vocab_size=len(tokenizer), seed=1, **sizes)
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "model").symlink_to(byte_model)
    with start(run, port=0, threads_per_replica=1, num_replicas=2, weight_updates=True) as server:
        assert ray_cluster.is_initialized()
        before = ask(server)
        assert before.headers["x-thornback-weight-version"] == "0"

        body = {"model_path": str(newer), "weight_version": 7}
        told = httpx.post(f"{server.url}/update_weights_from_disk", json=body, trust_env=False, timeout=120)
        assert told.json() == {"weight_version": 7, "num_replicas": 2}
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


def test_haproxy_has_ports_of_its_own_unless_they_are_given(monkeypatch):
    from thornback.serve import server

    for name in server.HAPROXY_PORTS:
        monkeypatch.delenv(name, raising=False)
    ports = [server._haproxys()[name] for name in server.HAPROXY_PORTS]
    assert len({*ports, "9101", "8404"}) == 4
    monkeypatch.setenv(server.HAPROXY_PORTS[0], "9200")
    with server._environment(server._haproxys()):
        assert os.environ[server.HAPROXY_PORTS[0]] == "9200"
        assert os.environ[server.HAPROXY] == "1"
    assert server.HAPROXY not in os.environ
