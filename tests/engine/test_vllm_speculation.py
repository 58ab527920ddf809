"""Guesses under vLLM: what is said does not depend on them, and what they save is counted.

Runs where vLLM is installed, which is the benchmarks' environment: `make test-vllm`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.reference import Reference
from tests.engine.test_vllm_engine import SIZES
from tests.vllm import NEEDS_VLLM
from thornback.contracts import ConfigError, EngineConfig, Request, SamplingParams, SpeculationConfig, TokenTree
from thornback.data import Datastore, PromptLookup
from thornback.engine import TorchEngine, generate
from thornback.engine.draft_head import DraftHead
from thornback.engine.model import load_model
from thornback.engine.vllm_engine import VllmEngine

pytestmark = NEEDS_VLLM
VOCABULARY, NEW_TOKENS = 64, 24
_kept: list[VllmEngine] = []  # vLLM's engines of a process share what the first to go takes down


def requests_of(count: int, **sampling) -> list[Request]:
    """Prompts of 2 to 25 tokens; many hold the same tokens twice."""
    rng = np.random.default_rng(count)
    requests = []
    for i in range(count):
        said = rng.integers(5, VOCABULARY, rng.integers(1, 9)).tolist()
        prompt = (*rng.integers(5, VOCABULARY, rng.integers(1, 10)).tolist(), *said, *said[: i % len(said) + 1])
        params = {"max_tokens": NEW_TOKENS, "seed": i, "ignore_eos": True, **sampling}
        requests.append(Request(str(i), prompt, SamplingParams(**params)))
    return requests


def answers(engine, requests: list[Request]) -> dict[str, list[list[int]]]:
    return {name: [c.token_ids.tolist() for c in found] for name, found in generate(engine, requests).items()}


def outputs_of(engine, requests: list[Request]) -> dict[str, list[tuple[int, list[tuple[int, float]]]]]:
    """Each request's tokens, and the alternatives to each."""
    for request in requests:
        engine.add_request(request)
    found: dict[str, list] = {request.request_id: [] for request in requests}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tables = output.top_logprobs or [[] for _ in output.token_ids]
            found[output.request_id] += zip(output.token_ids, tables, strict=True)
    return found


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3", **SIZES)


@pytest.fixture(scope="module")
def torch_engine(model) -> TorchEngine:
    return TorchEngine(model, EngineConfig(num_threads=1, max_num_seqs=32))


def vllm(model, retrievers=(), **speculation) -> VllmEngine:
    speculation = {"num_nodes": 6, "adaptive": False, **speculation}
    config = EngineConfig(
        max_num_seqs=8,
        max_model_len=128,
        kv_cache_memory_bytes=1 << 28,
        num_threads=1,
        speculation=SpeculationConfig(**speculation),
    )
    engine = VllmEngine(str(model), config, tuple(retrievers))
    _kept.append(engine)
    return engine


@pytest.fixture(scope="module")
def guessing(model, torch_engine) -> VllmEngine:
    """Knows every second answer of `requests_of(24)`, greedy and sampled."""
    known = []
    for temperature in (0.0, 1.0):
        requests = requests_of(24, temperature=temperature)
        said = answers(torch_engine, requests)
        known += [[*r.prompt_token_ids, *said[r.request_id][0]] for r in requests[::2]]
    return vllm(model, [PromptLookup(), Datastore.build(known, 2 * VOCABULARY)])


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        "sampling",
        [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
            {"temperature": 1.0, "n": 3},
            {"temperature": 1.0, "min_tokens": 20, "ignore_eos": False, "stop_token_ids": tuple(range(5, 20))},
            {"temperature": 0.0, "ignore_eos": False, "stop_token_ids": (7, 8, 9, 10)},
            {"temperature": 0.0, "max_tokens": 3},
        ],
        ids=str,
    )
    def test_it_does_not_depend_on_guesses(self, guessing, torch_engine, model, sampling) -> None:
        requests = requests_of(24, **sampling)
        before, reference = guessing.load().speculation, Reference(model)
        got, wanted = generate(guessing, requests), generate(torch_engine, requests)
        for request in requests:
            for i, (one, other) in enumerate(zip(got[request.request_id], wanted[request.request_id], strict=True)):
                params = replace(request.sampling, seed=request.sampling.seed + i)
                one_ids, other_ids = one.token_ids.tolist(), other.token_ids.tolist()
                reference.assert_same(request.prompt_token_ids, one_ids, other_ids, params)
                if one_ids == other_ids:
                    assert one.finish_reason == other.finish_reason
                    assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)
        stats = guessing.load().speculation.since(before)
        assert stats.num_drafts > 0
        assert stats.num_failures == 0
        assert stats.num_accepted_tokens <= stats.num_draft_tokens
        assert sum(stats.per_position) == stats.num_accepted_tokens

    def test_alternatives_and_schemas_beside_guesses(self, guessing, torch_engine) -> None:
        schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
        requests = requests_of(24, temperature=0.0, logprobs=3)
        requests[3] = replace(requests[3], sampling=SamplingParams(max_tokens=16, json_schema=schema, seed=0))
        got, wanted = outputs_of(guessing, requests), outputs_of(torch_engine, requests)
        for name in wanted:
            assert [token for token, _ in got[name]] == [token for token, _ in wanted[name]]
            for (_, mine), (_, theirs) in zip(got[name], wanted[name], strict=True):
                assert [token for token, _ in mine] == [token for token, _ in theirs]
                assert np.allclose([score for _, score in mine], [score for _, score in theirs], atol=1e-4)

    def test_it_ends_where_the_model_does(self, guessing, torch_engine) -> None:
        requests = requests_of(8, temperature=0.0, max_tokens=200)
        got, wanted = answers(guessing, requests), answers(torch_engine, requests)
        for request in requests:
            (one,), (other,) = got[request.request_id], wanted[request.request_id]
            assert len(request.prompt_token_ids) + len(one) == guessing.max_model_len
            assert one == other[: len(one)]


def test_nothing_is_guessed_for_a_schema_whatever_happens_beside_it(guessing, torch_engine) -> None:
    """Near a neighbour's limit vLLM drafts zeros for all, where it is let."""
    schema = Request("schema", (7,) * 8, SamplingParams(max_tokens=8, temperature=0.0, json_schema='{"const": 110}'))
    (alone,) = answers(torch_engine, [schema])["schema"]
    guessing.add_request(Request("long", (7,) * 8, SamplingParams(max_tokens=200, seed=0, ignore_eos=True)))
    said: dict[str, list[int]] = {"long": [], "schema": []}
    drafted, scheduler = [], guessing._llm.engine_core.engine_core.scheduler
    while guessing.has_unfinished_requests():
        for output in guessing.step():
            said[output.request_id] += output.token_ids
        drafted += [r.spec_token_ids for r in scheduler.requests.values() if r.num_prompt_tokens < r.num_tokens < 13]
        if not said["schema"] and 8 + len(said["long"]) == guessing.max_model_len - 6:
            guessing.add_request(schema)
    assert said["schema"] == alone
    assert len(drafted) == 4 + 3  # of the first steps of the one, and of the other's
    assert drafted[4:] == [[], [], []]


def test_little_room_delays_guesses_and_changes_nothing(model, torch_engine) -> None:
    """Few blocks, so that requests are preempted, and passes no longer than a chain."""
    rng = np.random.default_rng(1)
    requests = []
    for i in range(24):
        said = rng.integers(5, VOCABULARY, rng.integers(4, 34)).tolist()
        requests.append(
            Request(str(i), (*said, *said, *said[:3]), SamplingParams(max_tokens=NEW_TOKENS, seed=i, ignore_eos=True))
        )
    wanted = answers(torch_engine, requests)
    known = [[*r.prompt_token_ids, *wanted[r.request_id][0]] for r in requests]
    config = EngineConfig(
        max_num_seqs=8,
        max_model_len=128,
        num_blocks=14,
        max_num_batched_tokens=32,
        num_threads=1,
        speculation=SpeculationConfig(num_nodes=32, adaptive=False),
    )
    engine = VllmEngine(str(model), config, (Datastore.build(known, 2 * VOCABULARY),))
    _kept.append(engine)
    cached = [Request(str(i), tuple(range(5, 5 + 33)), SamplingParams(max_tokens=4, seed=0)) for i in range(2)]
    for request in cached:  # vLLM would pad the second, all but a token of which is cached, beyond a pass
        engine.add_request(request)
        for _ in range(12):
            engine.step()
        assert not engine.has_unfinished_requests()
    got = answers(engine, requests)
    reference = Reference(model)
    for request in requests:
        (one,), (other,) = got[request.request_id], wanted[request.request_id]
        reference.assert_same(request.prompt_token_ids, one, other, request.sampling)
    assert engine.load().speculation.num_accepted_tokens > 24


def test_what_is_known_is_said_in_fewer_passes(guessing, torch_engine) -> None:
    requests = requests_of(24, temperature=1.0)[:1]
    guessing.add_request(requests[0])
    steps: list[list[int]] = []
    while guessing.has_unfinished_requests():
        steps.append([token for output in guessing.step() for token in output.token_ids])
    assert len(steps) <= 2 + NEW_TOKENS / 4
    assert [token for step in steps for token in step] == answers(torch_engine, requests)["0"][0]


def test_a_request_that_goes_on(guessing, torch_engine) -> None:
    (request,) = requests_of(24, temperature=1.0)[:1]
    (whole,) = answers(torch_engine, [request])["0"]
    rest = replace(request, request_id="rest", output_token_ids=tuple(whole[:9]))
    assert whole[:9] + answers(guessing, [rest])["rest"][0] == whole


def test_an_aborted_request_is_forgotten(guessing) -> None:
    for request in requests_of(4, temperature=1.0):
        guessing.add_request(request)
    for _ in range(4):
        guessing.step()
    for i in range(4):
        guessing.abort_request(str(i))
    answers(guessing, requests_of(1))
    load = guessing.load()
    assert load.num_free_blocks == load.num_blocks
    (held,) = guessing._llm.collective_rpc(lambda worker: len(worker.model_runner.drafter._sequences))
    assert held <= 1  # of the request that ended last


def test_guesses_adapt_and_costs_can_be_given(model, torch_engine) -> None:
    requests = requests_of(24, temperature=1.0)
    wanted = answers(torch_engine, requests)
    engine = vllm(model, [PromptLookup()], adaptive=True)
    costs = dict(engine.speculation.costs)
    assert {-8, -1, 0, 1, 64} <= set(costs)  # of steps that do not guess, and of passes
    assert costs[-8] >= costs[-1] > 0
    assert answers(engine, requests) == wanted
    engine.fix_costs(((-8, 1.0), (-1, 1.0), (0, 0.0), (1, 1.0), (2, 100.0), (64, 1e4)))  # no guess is worth that
    before = engine.load().speculation
    assert answers(engine, requests) == wanted
    assert engine.load().speculation.since(before).num_draft_tokens == 0
    said = []
    for _ in range(2):  # and with costs given, guesses are what they were
        engine.fix_costs(((-8, 1.0), (-1, 1.0), (0, 0.0), (1, 1.0), (64, 1.1)))
        before = engine.load().speculation
        engine.flush_prefix_cache()
        assert answers(engine, requests) == wanted
        said.append(engine.load().speculation.since(before))
    assert said[0] == said[1]
    assert said[0].num_draft_tokens > 0


def test_a_small_model_drafts(model, torch_engine) -> None:
    requests = requests_of(24, temperature=0.0)
    engine = vllm(model, draft=str(model), draft_depth=4, draft_top_k=2)  # the model itself: it is always right
    assert answers(engine, requests) == answers(torch_engine, requests)
    stats = engine.load().speculation
    assert stats.num_accepted_tokens > 0.8 * stats.num_draft_tokens > 100
    blocks = engine.speculation._drafter._blocks
    answers(engine, requests_of(1))
    assert blocks.num_free >= blocks.num_blocks - 2  # what has ended has given its own back


def test_a_draft_head_is_refused(model, tmp_path) -> None:
    DraftHead.new(load_model(model)).save(tmp_path / "head")
    with pytest.raises(ConfigError, match="hidden states"):
        vllm(model, draft=str(tmp_path / "head"))


class Failing:
    """A retriever that fails whoever has a long context."""

    def retrieve(self, context: np.ndarray, num_nodes: int) -> TokenTree:
        if len(context) > 20:
            raise RuntimeError("no")
        return TokenTree(np.array([7], np.int32), np.array([-1], np.int32), np.ones(1, np.float32))


def test_a_retriever_that_fails_costs_its_requests_guesses_only(model, torch_engine) -> None:
    requests = requests_of(24, temperature=1.0)
    engine = vllm(model, [Failing()])
    assert answers(engine, requests) == answers(torch_engine, requests)
    stats = engine.load().speculation
    assert stats.num_drafts > 0
    assert stats.num_failures == 24


def test_kernels_use_the_threads_that_vllm_was_started_with() -> None:
    """Two OpenMP libraries in a process wait for work beside each other: a step took twice as long."""
    library = str(Path(sys.prefix, "lib", "libiomp5.so"))
    program = f"""
import ctypes, torch
from thornback.engine.compiled import _OPENMP
address = lambda function: ctypes.cast(function, ctypes.c_void_p).value
assert address(_OPENMP[0]) == address(ctypes.CDLL({library!r}).GOMP_parallel)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "LD_PRELOAD": library})
