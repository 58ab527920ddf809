"""A server whose replicas run vLLM: the texts are those of our own engine, whoever dies and whatever is loaded."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.serve.conftest import MODEL, make_byte_model
from tests.serve.test_split import answers, check_same, mixed_requests
from tests.serve.test_split_faults import check_back_to_normal, under_load
from tests.vllm import NEEDS_VLLM
from thornback.contracts import EngineConfig, Request, SamplingParams

pytestmark = NEEDS_VLLM
PROMPT = tuple(range(3, 60))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By version; vLLM's attention on CPU has no heads of fewer than 32 numbers."""
    directory = tmp_path_factory.mktemp("vllm")
    return [make_byte_model(directory / str(seed), head_dim=32, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def server(serve, models):
    return serve(
        models[0],
        *("--engine", "vllm", f"served_model_name={MODEL}", "weight_updates=true", "threads_per_replica=1"),
        *("num_replicas=2", "engine.max_model_len=2048"),
    )


def texts(model, sampling: SamplingParams) -> list[str]:
    """What our engine says to `PROMPT`."""
    from thornback.engine import TorchEngine, generate
    from thornback.serve.text import Text, load_tokenizer

    engine = TorchEngine(str(model), EngineConfig(num_threads=1, num_blocks=96))
    samples = generate(engine, [Request("r", PROMPT, sampling)])["r"]
    return [Text(load_tokenizer(str(model))).decode(sample.token_ids.tolist()) for sample in samples]


def ask(server, **more):
    body = {"model": MODEL, "prompt": [*PROMPT], "max_tokens": 24, "seed": 5, "extra_body": {"ignore_eos": True}}
    return server.client().completions.create(**{**body, **more})


def test_texts_are_those_of_our_engine(server, models):
    wanted = texts(models[0], SamplingParams(n=3, max_tokens=24, ignore_eos=True, seed=5, top_p=0.8, temperature=0.9))
    answer = ask(server, n=3, top_p=0.8, temperature=0.9, logprobs=2)
    assert [choice.text for choice in answer.choices] == wanted
    assert len(answer.choices[0].logprobs.token_logprobs) == 24
    assert answer.usage.completion_tokens == 72
    streamed = ["", "", ""]
    for chunk in ask(server, n=3, top_p=0.8, temperature=0.9, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == wanted


def test_a_stream_goes_on_with_another_replica(server, models):
    streams = [ask(server, max_tokens=1200, seed=seed, stream=True) for seed in (5, 6)]  # one on each
    said = [next(stream).choices[0].text for stream in streams]
    os.kill(server.replica_pids()[0], signal.SIGKILL)
    for i, stream in enumerate(streams):
        said[i] += "".join(chunk.choices[0].text for chunk in stream)
    for seed, text in zip((5, 6), said, strict=True):
        assert [text] == texts(models[0], SamplingParams(max_tokens=1200, ignore_eos=True, seed=seed))


def test_a_schema_is_followed(server):
    answer = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=20, seed=1,
        response_format={"type": "json_object"},
    )  # fmt: skip
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.fixture(scope="module")
def split(serve, models):
    return serve(
        models[0],
        *("--pd", "--engine", "vllm", f"served_model_name={MODEL}", "threads_per_replica=1", "split_tokens=8"),
        *("engine.max_model_len=1024", "engine.kv_cache_memory_bytes=16000000", "--speculate", "rasd"),
    )


def test_split_serving_says_what_one_replica_says(split, server):
    check_same(split, server, mixed_requests(60))


def test_a_prefill_replica_that_is_killed_changes_no_answer(split, server):
    requests = [
        {**r, "stream": True, "max_tokens": max(12, r["max_tokens"])} for r in mixed_requests(160) if "n" not in r
    ]
    wanted = answers(server, requests, 16)
    (victim,) = split.replica_pids("Prefill")
    lost = {engine for engine in split.engines() if engine.startswith("Prefill")}
    results, late = under_load(split, requests, lambda: os.kill(victim, signal.SIGKILL))
    assert not late
    assert sum(got != want for got, want in zip(results, wanted, strict=True)) <= len(requests) // 100
    check_back_to_normal(split, requests, answers(server, requests[:40], 16), lost)


def test_guesses_change_no_text(serve, models, tmp_path):
    sampling = SamplingParams(n=2, max_tokens=48, ignore_eos=True, seed=5, temperature=0.9)
    wanted = texts(models[0], sampling)
    server = serve(
        models[0],
        *("--engine", "vllm", "--speculate", "rasd", f"served_model_name={MODEL}", "threads_per_replica=1"),
        *("engine.max_model_len=2048", "speculation.adaptive=false", "speculation.learn_from_traffic=true"),
    )
    for _ in range(2):  # what was said the first time is known the second
        answer = ask(server, n=2, max_tokens=48, temperature=0.9)
        assert [choice.text for choice in answer.choices] == wanted
        time.sleep(1.5)
    drafts, tokens, accepted = (
        server.metric(f"vllm:spec_decode_num_{name}_total") for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    assert 0 < drafts < 2 * 2 * 48
    assert 48 < accepted <= tokens


def test_other_weights_answer(server, models):
    """The last one: the server goes on with them."""
    answer = server.http().post("/update_weights_from_disk", json={"model_path": str(models[1])}, timeout=120)
    assert answer.status_code == 200, answer.text
    assert [ask(server).choices[0].text] == texts(models[1], SamplingParams(max_tokens=24, ignore_eos=True, seed=5))
