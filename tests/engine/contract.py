"""What every engine must do. A test class of an implementation inherits `EngineContract` and makes the engine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.reference import Reference
from thornback.contracts import Engine, InvalidRequest, Request, SamplingParams
from thornback.engine import generate

PROMPTS = [tuple(int(t) for t in np.random.default_rng(7).integers(4, 118, size=n)) for n in (1, 3, 17, 40, 64, 5)]


class EngineContract:
    """Needs the fixtures `engine` (idle, its caches in any state) and `reference` over the same weights."""

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
        assert not engine.has_unfinished_requests()
