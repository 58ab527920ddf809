"""vLLM behind the contract: the engine suite's core, against an engine that we did not write.

Runs where vLLM is installed, which is the benchmarks' environment: `make test-vllm`.
"""

from __future__ import annotations

import pytest

from tests.engine.contract import PROMPTS, EngineContract, each_request_runs_under_its_adapter
from tests.engine.lora import make_adapters
from tests.engine.reference import Reference
from tests.vllm import NEEDS_VLLM
from thornback.contracts import ConfigError, EngineConfig, InvalidRequest, ModelError, Request
from thornback.engine.vllm_engine import VllmEngine

pytestmark = NEEDS_VLLM
SIZES = {"hidden_size": 128}  # vLLM's attention on CPU has no heads of fewer than 32 numbers


@pytest.fixture(scope="module")
def reference(tiny_model) -> Reference:
    return Reference(tiny_model("qwen3", **SIZES))


@pytest.fixture(scope="module")
def other(tiny_model) -> Reference:
    return Reference(tiny_model("qwen3", **SIZES, seed=1))


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory) -> tuple[tuple[str, str], ...]:
    return make_adapters(tiny_model("qwen3", **SIZES), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def shared_engine(tiny_model, adapters) -> VllmEngine:
    config = EngineConfig(max_num_seqs=8, max_model_len=128, kv_cache_memory_bytes=1 << 28, adapters=adapters)
    return VllmEngine(str(tiny_model("qwen3", **SIZES)), config)


@pytest.fixture
def engine(shared_engine):
    yield shared_engine
    load = shared_engine.load()
    assert load.num_free_blocks == load.num_blocks, "blocks were leaked"


class TestContract(EngineContract):
    pass


def test_each_request_runs_under_its_adapter(engine, tiny_model, adapters) -> None:
    each_request_runs_under_its_adapter(engine, tiny_model("qwen3", **SIZES), adapters)


def test_another_device_than_its_own_is_refused(tiny_model) -> None:
    with pytest.raises(ConfigError, match="built for CPUs"):
        VllmEngine(str(tiny_model("qwen3", **SIZES)), EngineConfig(device="cuda"))


def test_a_model_that_it_cannot_run_on_cpu_is_refused_before_it_is_loaded(tiny_model) -> None:
    with pytest.raises(ModelError, match="heads of 16 numbers"):
        VllmEngine(str(tiny_model("qwen3")), EngineConfig(max_model_len=64))


def test_hand_overs_are_refused(engine) -> None:
    with pytest.raises(InvalidRequest, match="without a kv_location"):
        engine.add_request(Request("kv", PROMPTS[1], export_kv=True))
    assert not engine.has_unfinished_requests()
