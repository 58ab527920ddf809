"""What is wrong with a server's settings or its model is said before Ray starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

from thornback.contracts import ConfigError, ModelError
from thornback.serve.config import ServeConfig, serve_config
from thornback.serve.model_source import resolve_model
from thornback.serve.server import free_port


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prot": 1}, "no setting prot; did you mean port?"),
        ({"engine": {"max_num_seq": 1}}, "no setting engine.max_num_seq; did you mean max_num_seqs?"),
        ({"limits": {"zebra": 1}}, "no setting limits.zebra."),
        ({"port": 70000}, "port is 70000"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas is 2"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        serve_config(model="m", **settings)


def test_settings_cost_neither_ray_nor_torch():
    code = "import sys; from thornback.serve import ServeConfig; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_engine_setting_reaches_the_engine():
    config = ServeConfig(model="m", engine={"max_model_len": 7, "block_size": 8}).engine.engine_config(3)
    assert (config.max_model_len, config.block_size, config.num_threads) == (7, 8, 3)


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} .* in use"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
    assert free_port("127.0.0.1", 0) > 0


def make_model(directory, tokenizer=True, weights=True):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    if weights:
        (directory / "model.safetensors").write_bytes(b"")
    if tokenizer:
        (directory / "tokenizer.json").write_text("{}")
    return directory


def test_a_model_of_every_kind(tmp_path):
    model = make_model(tmp_path / "plain")
    assert resolve_model(model) == str(model)
    assert resolve_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    run = tmp_path / "run"
    make_model(run / "checkpoints" / "step-9")
    newest = make_model(run / "checkpoints" / "step-10")
    (run / "checkpoints" / ".step-11.tmp").mkdir()
    assert resolve_model(run) == str(newest)
    final = make_model(run / "model")
    assert resolve_model(run) == str(final)


def test_what_is_no_model(tmp_path):
    for place, words in (
        (tmp_path / "nowhere", "not a directory"),
        (tmp_path, "neither a model"),
        (make_model(tmp_path / "a", tokenizer=False), "no tokenizer"),
        (make_model(tmp_path / "b", weights=False), "no .*safetensors"),
    ):
        with pytest.raises(ModelError, match=words) as raised:
            resolve_model(place)
        assert str(place) in str(raised.value)
    broken = make_model(tmp_path / "c")
    for text in ("{", "[]"):
        (broken / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json"):
            resolve_model(broken)
