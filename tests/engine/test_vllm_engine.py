"""vLLM behind the contract: the engine suite's core, against an engine that we did not write.

Runs where vLLM is installed, which is the benchmarks' environment:
`.venv-bench/bin/python -m pytest tests/engine/test_vllm_engine.py`.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.engine.contract import PROMPTS, EngineContract
from tests.engine.reference import Reference
from thornback.contracts import EngineConfig, InvalidRequest, Request, SamplingParams
from thornback.engine import copy_parameters, generate
from thornback.engine.vllm_engine import VllmEngine

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here; `make bench` makes an environment that has it",
    ),
]
SIZES = {"hidden_size": 128}  # vLLM's attention on CPU has no heads of fewer than 32 numbers
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def reference(tiny_model) -> Reference:
    return Reference(tiny_model("qwen3", **SIZES))


@pytest.fixture(scope="module")
def shared_engine(tiny_model) -> VllmEngine:
    config = EngineConfig(max_num_seqs=8, max_model_len=128, kv_cache_memory_bytes=1 << 28)
    return VllmEngine(str(tiny_model("qwen3", **SIZES)), config, enforce_eager=True)


@pytest.fixture
def engine(shared_engine):
    yield shared_engine
    load = shared_engine.load()
    assert load.num_free_blocks == load.num_blocks, "blocks were leaked"


class TestContract(EngineContract):
    pass


def test_new_weights_answer_and_old_ones_come_back(engine, reference, tiny_model) -> None:
    other = Reference(tiny_model("qwen3", **SIZES, seed=1))
    for model, version in ((other, 1), (reference, 2)):
        engine.load_weights(copy_parameters(model.model), version)
        samples = generate(engine, [Request(str(i), prompt, GREEDY) for i, prompt in enumerate(PROMPTS)])
        for i, prompt in enumerate(PROMPTS):
            sample = samples[str(i)][0]
            model.assert_same(prompt, sample.token_ids.tolist(), model.greedy(prompt, 12), GREEDY)
            assert set(sample.versions) == {version}
    assert engine.load().weight_version == 2


def test_alternatives_come_in_falling_order(engine, reference) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=4)
    engine.add_request(Request("top", PROMPTS[2], sampling))
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    for out in outputs:
        (top,) = out.top_logprobs
        assert len(top) == 4
        assert top[0] == (out.token_ids[0], out.logprobs[0])  # greedy draws the likeliest
        assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)


def test_a_pause_stands_still_and_weights_wait_for_requests(engine, reference) -> None:
    engine.add_request(Request("p", PROMPTS[2], GREEDY))
    engine.pause()
    assert engine.step() == []
    with pytest.raises(RuntimeError, match="between requests"):
        engine.load_weights(copy_parameters(reference.model), 9)
    engine.resume()
    tokens = []
    while engine.has_unfinished_requests():
        tokens += [t for out in engine.step() for t in out.token_ids]
    reference.assert_same(PROMPTS[2], tokens, reference.greedy(PROMPTS[2], 12), GREEDY)


def test_what_vllm_cannot_do_is_refused(engine) -> None:
    for request in (
        Request("kv", PROMPTS[1], export_kv=True),
        Request("moved", PROMPTS[1], output_token_ids=(5,)),
        Request("cut", PROMPTS[1], SamplingParams(top_p=0.5)),
    ):
        with pytest.raises(InvalidRequest, match="torch engine"):
            engine.add_request(request)
    assert not engine.has_unfinished_requests()
