"""The torch engine against the plain model: three architectures, with every mechanism forced."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.engine.contract import PROMPTS, EngineContract
from tests.engine.reference import Reference
from thornback.contracts import EngineConfig, InvalidRequest, Request, SamplingParams
from thornback.engine import TorchEngine, copy_parameters, generate, load_model

# Small blocks, chunks and pool: prompts come in pieces, and sequences are preempted all the time.
TIGHT = EngineConfig(block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=24, max_model_len=96)
GREEDY_10 = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module", params=("qwen3", "qwen2", "llama"))
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def reference(tiny_model, architecture):
    return Reference(tiny_model(architecture))


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


@pytest.fixture(scope="module")
def other(tiny_model):
    """The same architecture with other weights."""
    return tiny_model("qwen3", seed=1)


@pytest.fixture
def roomy(qwen):
    return TorchEngine(qwen, EngineConfig(max_num_seqs=16, max_model_len=256, block_size=16))


def test_min_tokens_keeps_stop_tokens_out(roomy) -> None:
    params = SamplingParams(max_tokens=9, stop_token_ids=tuple(range(128)), seed=0)
    assert len(generate(roomy, [Request("a", PROMPTS[0], params)])["a"][0].token_ids) == 1
    params = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=tuple(range(64)), seed=0)
    sample = generate(roomy, [Request("b", PROMPTS[0], params)])["b"][0]
    assert len(sample.token_ids) > 5
    assert all(t >= 64 for t in sample.token_ids[:5])


def test_alternatives_and_prompt_logprobs(roomy, qwen) -> None:
    prompt = PROMPTS[3]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    roomy.add_request(Request("a", prompt, params))
    outputs = []
    while roomy.has_unfinished_requests():
        outputs += roomy.step()
    scores = Reference(qwen).logits([*prompt, *[t for o in outputs for t in o.token_ids]]).log_softmax(-1)
    for i, out in enumerate(outputs):
        best = scores[len(prompt) - 1 + i].topk(3)
        assert [t for t, _ in out.top_logprobs[0]] == best.indices.tolist()
        np.testing.assert_allclose([p for _, p in out.top_logprobs[0]], best.values.numpy(), atol=1e-4)
    assert outputs[0].prompt_logprobs[0] is None
    assert len(outputs[0].prompt_logprobs) == len(prompt)
    for i in range(1, len(prompt)):
        own, alternatives = outputs[0].prompt_logprobs[i]
        assert abs(own - float(scores[i - 1, prompt[i]])) < 1e-4
        assert [t for t, _ in alternatives] == scores[i - 1].topk(2).indices.tolist()
    assert all(out.prompt_logprobs is None for out in outputs[1:])


def test_prompt_logprobs_survive_chunks(qwen) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)

    def scores(config: EngineConfig) -> list:
        engine = TorchEngine(qwen, config)
        engine.add_request(Request("a", PROMPTS[4], params))
        return next(out for _ in range(99) for out in engine.step()).prompt_logprobs

    whole, chunked = scores(EngineConfig(max_model_len=128)), scores(TIGHT)
    assert len(whole) == len(chunked) == len(PROMPTS[4])
    np.testing.assert_allclose([s[0] for s in whole[1:]], [s[0] for s in chunked[1:]], atol=1e-5)


def test_a_continued_request_goes_on_as_if_it_had_never_moved(roomy) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=3)
    whole = generate(roomy, [Request("a", PROMPTS[2], params)])["a"][0].token_ids.tolist()
    rest = generate(roomy, [Request("b", PROMPTS[2], params, output_token_ids=tuple(whole[:8]))])["b"][0]
    assert rest.token_ids.tolist() == whole[8:]


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


def test_weights_are_views_of_the_buffer_and_flush_prefixes(qwen, other) -> None:
    engine = TorchEngine(qwen, EngineConfig(max_model_len=128))
    generate(engine, [Request("warm", PROMPTS[4], GREEDY_10)])
    view = copy_parameters(load_model(other))
    view.buffer.setflags(write=False)
    engine.load_weights(view, version=7)
    low = view.buffer.ctypes.data
    assert all(low <= p.data_ptr() < low + view.buffer.nbytes for p in engine.model.parameters())
    engine.add_request(Request("a", PROMPTS[4], GREEDY_10))
    first = engine.step()[0]
    assert (first.weight_version, first.num_cached_tokens) == (7, 0)
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.load_weights(view, version=8)
    tokens = [*first.token_ids, *(t for _ in range(9) for o in engine.step() for t in o.token_ids)]
    assert tokens == Reference(other).greedy(PROMPTS[4], 10)


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_weights_swapped_in_flight(qwen, other, mode) -> None:
    engine = TorchEngine(qwen, EngineConfig(max_model_len=128))
    engine.add_request(Request("a", PROMPTS[4], GREEDY_10))
    before = [t for _ in range(4) for o in engine.step() for t in o.token_ids]
    assert before == Reference(qwen).greedy(PROMPTS[4], 4)
    engine.load_weights(copy_parameters(load_model(other)), 2, in_flight=mode)
    after = []
    while engine.has_unfinished_requests():
        for out in engine.step():
            assert out.weight_version == 2
            after += out.token_ids
    if mode == "recompute":
        assert after == Reference(other).greedy((*PROMPTS[4], *before), 6)
    # Blocks of mixed versions are never reused.
    fresh = generate(engine, [Request("b", (*PROMPTS[4], *before, *after), GREEDY_10)])["b"][0].token_ids.tolist()
    assert fresh == Reference(other).greedy((*PROMPTS[4], *before, *after), 10)


def test_a_schema_is_followed(roomy, qwen) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "b": {"type": "boolean"}},
        "required": ["n", "b"],
        "additionalProperties": False,
    }
    params = SamplingParams(n=4, max_tokens=150, seed=0, json_schema=json.dumps(schema))
    samples = generate(roomy, [Request("a", PROMPTS[1], params)])["a"]
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    for sample in samples:
        text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        assert text.startswith("{")
        if sample.finish_reason == "stop":
            assert set(json.loads(text)) == {"n", "b"}
    assert any(s.finish_reason == "stop" for s in samples)
    with pytest.raises(InvalidRequest, match="schema"):
        roomy.add_request(Request("b", PROMPTS[1], SamplingParams(json_schema='{"type": "nonsense"}')))


def test_bad_prompts_and_ids_are_refused(roomy) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary"):
        roomy.add_request(Request("a", (5, 100_000)))
    roomy.add_request(Request("b", (5,)))
    with pytest.raises(InvalidRequest, match="unique"):
        roomy.add_request(Request("b", (5,)))


def test_pause_holds_everything_back(roomy) -> None:
    roomy.add_request(Request("a", PROMPTS[1], SamplingParams(max_tokens=2, ignore_eos=True)))
    roomy.pause()
    assert roomy.step() == []
    assert roomy.has_unfinished_requests()
    roomy.resume()
    assert len(roomy.step()) == 1
