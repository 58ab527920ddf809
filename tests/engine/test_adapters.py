"""LoRA by request: one batch under several adapters equals peft's own models, one at a time."""

from __future__ import annotations

import pytest

from tests.engine.contract import each_request_runs_under_its_adapter
from tests.engine.lora import make_adapters
from thornback.contracts import EngineConfig, InvalidRequest, ModelError, Request
from thornback.engine import TorchEngine


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> tuple[tuple[str, str], ...]:
    return make_adapters(tiny_model("qwen3"), tmp_path_factory.mktemp("adapters"))


def test_each_request_runs_under_its_adapter(tiny_model, adapters) -> None:
    engine = TorchEngine(tiny_model("qwen3"), EngineConfig(adapters=adapters, block_size=4, max_model_len=128))
    each_request_runs_under_its_adapter(engine, tiny_model("qwen3"), adapters)


def test_unknown_and_broken_adapters_are_refused(tiny_model, adapters, tmp_path) -> None:
    engine = TorchEngine(tiny_model("qwen3"), EngineConfig(adapters=adapters, max_model_len=64))
    with pytest.raises(InvalidRequest, match="no adapter named eve; loaded: ada, bob"):
        engine.add_request(Request("a", (5,), adapter="eve"))
    with pytest.raises(ModelError, match="adapter_config"):
        TorchEngine(tiny_model("qwen3"), EngineConfig(adapters=(("eve", str(tmp_path)),), max_model_len=64))
