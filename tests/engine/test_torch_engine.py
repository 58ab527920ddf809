"""The torch engine against the plain model: three architectures, with every mechanism forced."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.contract import PROMPTS, EngineContract
from tests.engine.reference import Reference
from thornback.contracts import EngineConfig, Request, SamplingParams
from thornback.engine import TorchEngine, copy_parameters, generate

# Small blocks, chunks and pool: prompts come in pieces, and sequences are preempted all the time.
TIGHT = EngineConfig(block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=24, max_model_len=96)


@pytest.fixture(scope="module", params=("qwen3", "qwen2", "llama"))
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def reference(tiny_model, architecture):
    return Reference(tiny_model(architecture))


@pytest.fixture(scope="module")
def other(tiny_model, architecture):
    """The same architecture with other weights."""
    return Reference(tiny_model(architecture, seed=1))


@pytest.fixture(scope="module")
def shared_engine(tiny_model, architecture):
    return TorchEngine(tiny_model(architecture), TIGHT)


@pytest.fixture
def engine(shared_engine):
    yield shared_engine
    assert shared_engine.load().num_free_blocks == TIGHT.num_blocks, "blocks were leaked"


class TestContract(EngineContract):
    pass


def test_preemption_chunks_and_prefix_hits_change_nothing(tiny_model, architecture, reference) -> None:
    engine = TorchEngine(tiny_model(architecture), TIGHT)
    rng = np.random.default_rng(0)
    stem = tuple(int(t) for t in rng.integers(4, 118, size=30))
    prompts = [stem[: 6 * (i % 6)] + tuple(int(t) for t in rng.integers(4, 118, size=1 + i)) for i in range(24)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    cached = 0
    for i, prompt in enumerate(prompts):
        engine.add_request(Request(str(i), prompt, params))
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_unfinished_requests():
        for out in engine.step():
            tokens[out.request_id] += out.token_ids
            cached += out.num_cached_tokens
    assert engine.load().num_preempted > 0
    assert cached > 0
    for i, prompt in enumerate(prompts):
        reference.assert_same(prompt, tokens[str(i)], reference.greedy(prompt, 20), params)


def test_float64_sampling_is_exact_in_any_batch(qwen) -> None:
    roomy = EngineConfig(dtype="float64", block_size=8, max_num_seqs=32, max_model_len=128)
    tight = EngineConfig(dtype="float64", block_size=4, num_blocks=30, max_num_seqs=5, max_num_batched_tokens=16)
    requests = [
        Request(str(i), prompt, SamplingParams(n=3, temperature=0.9, top_p=0.9, seed=10 * i, max_tokens=30))
        for i, prompt in enumerate(PROMPTS)
    ]
    wanted = generate(TorchEngine(qwen, roomy), requests)
    got = generate(TorchEngine(qwen, tight), list(reversed(requests)))
    for name, samples in wanted.items():
        for a, b in zip(samples, got[name], strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-6)


@pytest.fixture(scope="module")
def qwen(tiny_model):
    return tiny_model("qwen3")


@pytest.fixture
def roomy(qwen):
    return TorchEngine(qwen, EngineConfig(max_num_seqs=16, max_model_len=256, block_size=16))


def test_prompt_logprobs_survive_chunks(qwen) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)

    def scores(config: EngineConfig) -> list:
        engine = TorchEngine(qwen, config)
        engine.add_request(Request("a", PROMPTS[4], params))
        return next(out for _ in range(99) for out in engine.step()).prompt_logprobs

    whole, chunked = scores(EngineConfig(max_model_len=128)), scores(TIGHT)
    assert len(whole) == len(chunked) == len(PROMPTS[4])
    np.testing.assert_allclose([s[0] for s in whole[1:]], [s[0] for s in chunked[1:]], atol=1e-5)


def test_samples_share_the_blocks_of_their_prompt(qwen) -> None:
    engine = TorchEngine(qwen, EngineConfig(block_size=4, num_blocks=64, max_num_seqs=16, max_model_len=200))
    engine.add_request(Request("a", PROMPTS[3], SamplingParams(n=8, max_tokens=4, ignore_eos=True)))
    engine.step()
    assert engine.load().num_running == 8
    assert engine.load().num_blocks - engine.load().num_free_blocks == 10  # 40 prompt tokens
    engine.abort_request("a")
    assert engine.load().num_free_blocks == 64


def test_samples_that_find_no_room_wait(qwen) -> None:
    engine = TorchEngine(qwen, EngineConfig(block_size=4, num_blocks=16, max_num_seqs=3, max_model_len=64))
    params = SamplingParams(n=8, max_tokens=12, ignore_eos=True, seed=0)
    samples = generate(engine, [Request("a", PROMPTS[2], params)])["a"]
    assert [len(s.token_ids) for s in samples] == [12] * 8
    assert len({tuple(s.token_ids) for s in samples}) == 8


def test_weights_are_views_of_the_buffer(tiny_model, architecture, other) -> None:
    engine = TorchEngine(tiny_model(architecture), EngineConfig(max_model_len=128))
    view = copy_parameters(other.model)
    view.buffer.setflags(write=False)
    engine.load_weights(view, version=7)
    low = view.buffer.ctypes.data
    assert all(low <= p.data_ptr() < low + view.buffer.nbytes for p in engine.model.parameters())
