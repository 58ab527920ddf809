"""What every engine must do. A test class of an implementation inherits `EngineContract` and makes the engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.engine.lora import greedy
from tests.engine.reference import Reference, allowed
from thornback.contracts import (
    Engine,
    InFlight,
    InvalidRequest,
    ModelError,
    Output,
    Request,
    SamplingParams,
    WeightView,
)
from thornback.engine import copy_parameters, generate
from thornback.engine.randomness import positional_uniform

PROMPTS = [tuple(int(t) for t in np.random.default_rng(7).integers(4, 118, size=n)) for n in (1, 3, 17, 40, 64, 5)]


TRUNCATIONS = ({}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01})
GREEDY_10 = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def drain(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for out in outputs for token in out.token_ids]


def each_request_runs_under_its_adapter(engine: Engine, model: Path, adapters: tuple[tuple[str, str], ...]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    known = {None: None, **dict(adapters)}
    requests = [Request(f"{name}{i}", p, params, adapter=name) for i, p in enumerate(PROMPTS) for name in known]
    for _ in range(2):  # the second time from the prefix cache, which must not mix adapters
        samples = generate(engine, requests)
        for name, path in known.items():
            for i, prompt in enumerate(PROMPTS):
                assert samples[f"{name}{i}"][0].token_ids.tolist() == greedy(model, path, prompt, 8)


class EngineContract:
    """Needs the fixtures `engine` (idle, its caches in any state), `reference` over the same weights, and `other`, a
    reference over other weights of the same shape."""

    def test_greedy_tokens_equal_the_plain_model(self, engine: Engine, reference: Reference) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        samples = generate(engine, [Request(f"g{i}", p, params) for i, p in enumerate(PROMPTS)])
        for i, prompt in enumerate(PROMPTS):
            reference.assert_same(prompt, samples[f"g{i}"][0].token_ids.tolist(), reference.greedy(prompt, 16), params)

    def test_logprobs_are_those_of_the_plain_model(self, engine: Engine, reference: Reference) -> None:
        params = SamplingParams(temperature=0.7, max_tokens=16, ignore_eos=True, seed=5)
        samples = generate(engine, [Request(f"l{i}", p, params) for i, p in enumerate(PROMPTS)])
        for i, prompt in enumerate(PROMPTS):
            sample = samples[f"l{i}"][0]
            wanted = reference.logprobs(prompt, sample.token_ids.tolist(), temperature=0.7)
            assert np.abs(sample.logprobs - wanted).max() < 1e-4

    def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(self, engine: Engine, reference: Reference) -> None:
        def request(i: int, name: str) -> Request:
            return Request(f"{name}{i}", PROMPTS[i], SamplingParams(max_tokens=12, ignore_eos=True, seed=100 + i))

        together = generate(engine, [request(i, "t") for i in range(len(PROMPTS))])
        for i, prompt in enumerate(PROMPTS):
            alone = generate(engine, [request(i, "a")])[f"a{i}"][0].token_ids.tolist()
            reference.assert_same(prompt, together[f"t{i}"][0].token_ids.tolist(), alone, request(i, "a").sampling)

    def test_samples_of_one_request_are_those_of_consecutive_seeds(self, engine: Engine, reference: Reference) -> None:
        prompt = PROMPTS[2]
        many = generate(engine, [Request("n", prompt, SamplingParams(n=4, max_tokens=10, ignore_eos=True, seed=30))])
        for i in range(4):
            single = SamplingParams(max_tokens=10, ignore_eos=True, seed=30 + i)
            alone = generate(engine, [Request(f"s{i}", prompt, single)])[f"s{i}"][0]
            reference.assert_same(prompt, many["n"][i].token_ids.tolist(), alone.token_ids.tolist(), single)

    def test_stops_at_stop_tokens_and_at_the_limit(self, engine: Engine, reference: Reference) -> None:
        prompt = PROMPTS[3]
        free = reference.greedy(prompt, 8)
        stop = free[5]
        params = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=(stop,), ignore_eos=True)
        sample = generate(engine, [Request("s", prompt, params)])["s"][0]
        assert sample.finish_reason == "stop"
        assert sample.token_ids.tolist() == free[: free.index(stop) + 1]
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        sample = generate(engine, [Request("l", prompt, params)])["l"][0]
        assert (sample.finish_reason, len(sample.token_ids)) == ("length", 3)

    def test_an_aborted_request_says_no_more_and_the_others_go_on(self, engine: Engine) -> None:
        params = SamplingParams(max_tokens=10, ignore_eos=True, seed=1)
        engine.add_request(Request("gone", PROMPTS[2], params))
        engine.add_request(Request("stays", PROMPTS[1], params))
        engine.step()
        engine.abort_request("gone")
        engine.abort_request("never was")
        seen = []
        while engine.has_unfinished_requests():
            seen += engine.step()
        assert {out.request_id for out in seen} == {"stays"}
        assert seen[-1].finish_reason == "length"

    def test_an_idle_engine_has_nothing_to_do(self, engine: Engine) -> None:
        assert not engine.has_unfinished_requests()
        assert engine.step() == []
        load = engine.load()
        assert (load.num_running, load.num_waiting) == (0, 0)

    def test_impossible_requests_are_refused(self, engine: Engine) -> None:
        with pytest.raises(InvalidRequest, match="empty"):
            engine.add_request(Request("e", ()))
        with pytest.raises(InvalidRequest, match="tokens"):
            engine.add_request(Request("long", (5,) * 100_000))
        with pytest.raises(InvalidRequest, match="vocabulary"):
            engine.add_request(Request("a", (5, 100_000)))
        with pytest.raises(InvalidRequest, match="no adapter named eve"):
            engine.add_request(Request("a", (5,), adapter="eve"))
        assert not engine.has_unfinished_requests()
        engine.add_request(Request("b", (5,)))
        with pytest.raises(InvalidRequest, match="unique"):
            engine.add_request(Request("b", (5,)))
        engine.abort_request("b")
        assert not engine.has_unfinished_requests()

    @pytest.mark.parametrize(
        "truncation",
        [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}],
        ids=str,
    )
    def test_draws_are_those_of_the_seed(self, engine: Engine, reference: Reference, truncation: dict) -> None:
        """By inverse CDF, in order of token id, from the number of (seed, position): the same tokens on any engine."""
        requests = [
            Request(
                f"d{i}", p, SamplingParams(temperature=0.8, max_tokens=8, ignore_eos=True, seed=70 + i, **truncation)
            )
            for i, p in enumerate(PROMPTS)
        ]
        samples = generate(engine, requests)
        for request in requests:
            sample, wanted = samples[request.request_id][0], []
            for position in range(8):
                left = allowed(reference.logits([*request.prompt_token_ids, *wanted])[-1].numpy(), request.sampling)
                draw = positional_uniform(np.array([request.sampling.seed]), np.array([position]))[0]
                wanted.append(int(np.searchsorted(left.cumsum(), draw, side="right")))
            got = sample.token_ids.tolist()
            if truncation:
                assert got == wanted
            else:
                reference.assert_same(request.prompt_token_ids, got, wanted, request.sampling)
            # before truncation, whatever was drawn from
            scores = reference.logprobs(request.prompt_token_ids, got, temperature=0.8)
            assert np.abs(sample.logprobs - scores).max() < 1e-4

    def test_min_tokens_keeps_stop_tokens_out(self, engine: Engine) -> None:
        params = SamplingParams(max_tokens=9, stop_token_ids=tuple(range(128)), seed=0)
        assert len(generate(engine, [Request("a", PROMPTS[0], params)])["a"][0].token_ids) == 1
        params = SamplingParams(max_tokens=9, min_tokens=5, stop_token_ids=tuple(range(64)), seed=0)
        sample = generate(engine, [Request("b", PROMPTS[0], params)])["b"][0]
        assert len(sample.token_ids) > 5
        assert all(t >= 64 for t in sample.token_ids[:5])

    def test_alternatives_and_prompt_logprobs(self, engine: Engine, reference: Reference) -> None:
        prompt = PROMPTS[3]
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3, prompt_logprobs=2)
        engine.add_request(Request("a", prompt, params))
        outputs = drain(engine)
        scores = reference.logits([*prompt, *tokens_of(outputs)]).log_softmax(-1)
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

    def test_a_continued_request_goes_on_as_if_it_had_never_moved(self, engine: Engine, reference: Reference) -> None:
        params = SamplingParams(max_tokens=20, min_tokens=12, stop_token_ids=tuple(range(100)), seed=3)
        whole = generate(engine, [Request("a", PROMPTS[2], params)])["a"][0]
        rest = generate(engine, [Request("b", PROMPTS[2], params, output_token_ids=tuple(whole.token_ids[:8]))])["b"][0]
        reference.assert_same(PROMPTS[2], [*whole.token_ids[:8], *rest.token_ids], whole.token_ids.tolist(), params)
        assert rest.finish_reason == whole.finish_reason

    def test_a_schema_is_followed(self, engine: Engine, reference: Reference) -> None:
        schema = {
            "type": "object",
            "properties": {"n": {"type": "integer"}, "b": {"type": "boolean"}},
            "required": ["n", "b"],
            "additionalProperties": False,
        }
        params = SamplingParams(max_tokens=90, json_schema=json.dumps(schema))
        plain = Request("plain", PROMPTS[1], SamplingParams(max_tokens=20, ignore_eos=True, seed=1))
        requests = [Request(f"j{i}", PROMPTS[1], replace(params, seed=i)) for i in range(4)]
        samples = generate(engine, [plain, *requests])
        tokenizer = AutoTokenizer.from_pretrained(reference.model.name_or_path)
        for request in requests:
            sample = samples[request.request_id][0]
            text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
            assert text.startswith("{")
            if sample.finish_reason == "stop":
                assert set(json.loads(text)) == {"n", "b"}
            begun = tuple(sample.token_ids[:5].tolist())
            (rest,) = generate(engine, [replace(request, output_token_ids=begun)])[request.request_id]
            assert [*begun, *rest.token_ids] == sample.token_ids.tolist()
        assert any(samples[request.request_id][0].finish_reason == "stop" for request in requests)
        with pytest.raises(InvalidRequest, match="schema"):
            engine.add_request(Request("b", PROMPTS[1], SamplingParams(json_schema='{"type": "nonsense"}')))

    def test_pause_holds_everything_back(self, engine: Engine) -> None:
        engine.add_request(Request("a", PROMPTS[1], SamplingParams(max_tokens=2, ignore_eos=True)))
        engine.pause()
        assert engine.step() == []
        assert engine.has_unfinished_requests()
        engine.resume()
        assert len(tokens_of(drain(engine))) == 2

    def test_new_weights_answer_and_flush_prefixes(
        self, engine: Engine, reference: Reference, other: Reference
    ) -> None:
        """Mapped read-only, as workers map them."""
        engine.load_weights(copy_parameters(reference.model), 6)
        generate(engine, [Request("warm", PROMPTS[4], GREEDY_10)])
        for model, version in ((other, 7), (reference, 8), (other, 7)):  # the last as after a checkpoint
            view = copy_parameters(model.model)
            view.buffer.setflags(write=False)
            engine.load_weights(view, version)
            engine.add_request(Request("a", PROMPTS[4], GREEDY_10))
            outputs = []
            while not outputs:
                outputs = engine.step()
            assert (outputs[0].weight_version, outputs[0].num_cached_tokens) == (version, 0)
            with pytest.raises(RuntimeError, match="unfinished"):
                engine.load_weights(view, version=9)
            model.assert_same(PROMPTS[4], tokens_of(outputs + drain(engine)), model.greedy(PROMPTS[4], 10), GREEDY_10)
            assert engine.load().weight_version == version

    def test_requests_that_wait_for_room_begin_under_the_new_weights(
        self, engine: Engine, reference: Reference, other: Reference
    ) -> None:
        engine.load_weights(copy_parameters(reference.model), 1)
        many = SamplingParams(n=10, temperature=0.0, max_tokens=10, ignore_eos=True)
        engine.add_request(Request("a", PROMPTS[4][:33], many))
        before: list[Output] = []
        while not before:
            before = engine.step()
        engine.load_weights(copy_parameters(other.model), 2, in_flight="keep")
        outputs = drain(engine)
        late = set(range(10)) - {out.index for out in before}
        assert late, "nobody waited"
        for index in late:
            tokens = tokens_of([out for out in outputs if out.index == index])
            other.assert_same(PROMPTS[4][:33], tokens, other.greedy(PROMPTS[4][:33], 10), GREEDY_10)
        engine.load_weights(copy_parameters(reference.model), 3)

    def test_weights_that_do_not_fit_are_refused_and_change_nothing(self, engine: Engine, reference: Reference) -> None:
        whole = copy_parameters(reference.model)
        engine.load_weights(whole, 1)
        with pytest.raises(ModelError, match="norm"):
            engine.load_weights(WeightView(whole.buffer, whole.index[:-1]), 2)
        sample = generate(engine, [Request("a", PROMPTS[2], GREEDY_10)])["a"][0]
        reference.assert_same(PROMPTS[2], sample.token_ids.tolist(), reference.greedy(PROMPTS[2], 10), GREEDY_10)
        assert set(sample.versions) == {1}

    @pytest.mark.parametrize("mode", ["recompute", "keep"])
    def test_weights_swapped_in_flight(
        self, engine: Engine, reference: Reference, other: Reference, mode: InFlight
    ) -> None:
        engine.load_weights(copy_parameters(reference.model), 1)
        engine.add_request(Request("a", PROMPTS[4], GREEDY_10))
        before: list[int] = []
        while len(before) < 4:
            before += tokens_of(engine.step())
        reference.assert_same(PROMPTS[4], before, reference.greedy(PROMPTS[4], 4), GREEDY_10)
        engine.load_weights(copy_parameters(other.model), 2, in_flight=mode)
        outputs = drain(engine)
        assert {out.weight_version for out in outputs} == {2}
        prompt = (*PROMPTS[4], *before)
        if mode == "recompute":
            other.assert_same(prompt, tokens_of(outputs), other.greedy(prompt, 6), GREEDY_10)
        # Blocks of mixed versions are never reused.
        prompt += tuple(tokens_of(outputs))
        fresh = generate(engine, [Request("b", prompt, GREEDY_10)])["b"][0].token_ids.tolist()
        other.assert_same(prompt, fresh, other.greedy(prompt, 10), GREEDY_10)
        engine.load_weights(copy_parameters(reference.model), 3)
