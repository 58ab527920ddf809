"""A server that guesses says what one that does not says; and tells what its guesses were worth."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray

from thornback.cli.main import main
from thornback.contracts import EngineLoad, SpeculationStats
from thornback.data import Datastore, load_tokenizer, tokenizer_fingerprint
from thornback.serve.link import ReplicaReport
from thornback.serve.metrics import Metrics
from thornback.train.build import build_model

TEXT = "the quick brown fox jumps over the lazy dog and goes on "


@pytest.fixture(scope="module")
def sources(byte_model, tmp_path_factory) -> tuple[Path, Path]:
    """A datastore and an untrained draft head."""
    from thornback.engine import load_model
    from thornback.engine.draft_head import DraftHead

    place = tmp_path_factory.mktemp("sources")
    tokenizer = load_tokenizer(byte_model)
    documents = [tokenizer.encode(TEXT * 2, add_special_tokens=False)]
    Datastore.build(documents, len(tokenizer), tokenizer_fingerprint(byte_model)).save(str(place / "store.arrow"))
    DraftHead.new(load_model(byte_model)).save(place / "head")
    return place / "store.arrow", place / "head"


@pytest.fixture(scope="module")
def small(byte_model, tmp_path_factory) -> Path:
    """A smaller model with the same tokenizer."""
    place, tokenizer = tmp_path_factory.mktemp("small"), load_tokenizer(byte_model)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return build_model(place, tokenizer, vocab_size=len(tokenizer), max_position_embeddings=8192, **shape)


@pytest.fixture(scope="module")
def guessing(serve, byte_model, sources):
    store, head = sources
    return serve(
        byte_model, "--speculate", "rasd", "--datastore", str(store), "--draft", str(head),
        "speculation.learn_from_traffic=true", "speculation.num_nodes=12",
        "speculation.adaptive=false",  # else it depends on the machine's mood how much is guessed
        "served_model_name=tiny", "api_keys=[secret-key]", "threads_per_replica=1",
    )  # fmt: skip


def ask(server, prompt: str = TEXT[:30], **more) -> list[dict]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "logprobs": 1, **more}
    answer = server.http().post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


@pytest.mark.full
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5, "n": 3},
        {"temperature": 0.8, "seed": 6, "top_p": 0.9, "top_k": 40, "stop": ["a"]},
        {"temperature": 0.5, "seed": 7, "min_tokens": 9, "stop_token_ids": list(range(40, 90)), "ignore_eos": False},
    ],
)
def test_the_text_is_the_same(server, guessing, sampling) -> None:
    for choice, other in zip(ask(server, **sampling), ask(guessing, **sampling), strict=True):
        assert other["text"] == choice["text"]
        assert other["finish_reason"] == choice["finish_reason"]
        np.testing.assert_allclose(other["logprobs"]["token_logprobs"], choice["logprobs"]["token_logprobs"], atol=1e-3)


@pytest.mark.full
def test_a_small_model_drafts(serve, server, byte_model, small) -> None:
    """As above, with nothing else to guess from than prompt lookup."""
    drafting = serve(
        byte_model, "--speculate", "rasd", "--draft", str(small), "served_model_name=tiny", "api_keys=[secret-key]",
        "threads_per_replica=1",
    )  # fmt: skip
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 5, "n": 3}):
        for choice, other in zip(ask(server, **sampling), ask(drafting, **sampling), strict=True):
            assert other["text"] == choice["text"]
    assert drafting.metric("vllm:spec_decode_num_drafts_total") > 0
    assert drafting.metric("thornback:spec_decode_num_failures_total") == 0


@pytest.mark.full
def test_a_stream_is_the_same(server, guessing) -> None:
    texts = []
    for running in (server, guessing):
        stream = running.client().completions.create(
            model="tiny", prompt=TEXT[:25], max_tokens=50, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        chunks = list(stream)
        texts.append("".join(chunk.choices[0].text for chunk in chunks if chunk.choices))
        assert chunks[-1].usage.completion_tokens == 50
    assert texts[0] == texts[1]


@pytest.mark.full
def test_what_was_answered_is_guessed_from_and_counted(guessing) -> None:
    """A long answer, asked for again, takes few passes: it is found in the store; the counters say so."""
    prompt = "something that no document says: "
    first = ask(guessing, prompt, max_tokens=100, temperature=0, logprobs=None)
    names = [f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "draft_tokens", "accepted_tokens")]
    time.sleep(1)  # by then it is sorted
    before = [guessing.metric(name) for name in names]
    assert ask(guessing, prompt, max_tokens=100, temperature=0, logprobs=None)[0]["text"] == first[0]["text"]
    drafts, nodes, accepted = (guessing.metric(name) - was for name, was in zip(names, before, strict=True))
    assert 0 < drafts < 60
    assert nodes >= accepted > 40
    assert guessing.metric("vllm:spec_decode_num_accepted_tokens_per_pos_total") >= accepted
    assert guessing.metric("thornback:spec_decode_num_failures_total") == 0


@pytest.mark.full
def test_a_replica_that_is_killed_comes_back_and_guesses(guessing) -> None:
    ask(guessing)
    (pid,) = guessing.replica_pids()
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            if guessing.http().get("/health").status_code == 200 and guessing.replica_pids() not in ([], [pid]):
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    before = guessing.metric("vllm:spec_decode_num_drafts_total")
    ask(guessing, TEXT, max_tokens=80, temperature=0)
    assert guessing.metric("vllm:spec_decode_num_drafts_total") > before


def refused(capsys, *arguments: str) -> str:
    assert main(["serve", *arguments, "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("thornback: ")
    assert said.count("\n") == 1
    return said


def test_sources_that_do_not_fit_are_refused_at_the_start(
    byte_model, tiny_model, sources, small, tmp_path, capsys
) -> None:
    was = ray.is_initialized()
    store, head = map(str, sources)
    model, other, rasd = (
        str(byte_model),
        str(tiny_model("qwen3", hidden_size=128, vocab_size=512)),
        ("--speculate", "rasd"),
    )
    capsys.readouterr()
    assert "another tokenizer" in refused(capsys, other, *rasd, "--datastore", store)
    assert "made for another model" in refused(capsys, other, *rasd, "--draft", head)
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(Path(store).read_bytes()[:-40])
    assert "damaged" in refused(capsys, model, *rasd, "--datastore", str(cut))
    assert "cannot be read" in refused(capsys, model, *rasd, "--datastore", str(tmp_path / "none.arrow"))
    large = tmp_path / "large.arrow"
    Datastore.build([[1, 2, 3]], 1000, tokenizer_fingerprint(model)).save(str(large))
    assert "vocabulary of 1000" in refused(capsys, model, *rasd, "--datastore", str(large))
    assert "has a vocabulary of 512 tokens" in refused(capsys, model, *rasd, "--draft", other)
    foreign = str(tiny_model("qwen3", vocab_size=259))
    capsys.readouterr()
    assert "has another tokenizer than" in refused(capsys, model, *rasd, "--draft", foreign)
    mute = tmp_path / "mute"
    shutil.copytree(small, mute, ignore=shutil.ignore_patterns("tokenizer*"))
    assert "has no tokenizer to compare" in refused(capsys, model, *rasd, "--draft", str(mute))
    weights = mute / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    assert "is damaged" in refused(capsys, model, *rasd, "--draft", str(mute))
    assert "no readable config.json" in refused(capsys, model, *rasd, "--draft", str(tmp_path / "none"))
    assert "the method is off" in refused(capsys, model, "--datastore", store)
    assert ray.is_initialized() == was  # nothing had begun


def test_counters_rise_when_engines_start_over() -> None:
    def load(*counts: int) -> EngineLoad:
        return EngineLoad(0, 0, 0, 0, 1, 1, 0, SpeculationStats(*counts, (counts[2], 0)))

    metrics = Metrics("m")
    page = ""
    for stats in ((10, 50, 20, 0), (12, 60, 25, 1)):
        loads = {"a": load(*stats), "b": load(1, 2, 1, 0)}
        reports = [ReplicaReport("Replica", name, "node", 32, of) for name, of in loads.items()]
        page = metrics.render(reports, [metrics.own(0)])
    assert 'vllm:spec_decode_num_drafts_total{engine="Replica#a",model_name="m"} 12.0' in page
    assert (
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="Replica#a",model_name="m",position="0"} 25.0'
        in page
    )
    assert 'thornback:spec_decode_num_failures_total{engine="Replica#a",model_name="m"} 1.0' in page
    assert 'vllm:spec_decode_num_draft_tokens_total{engine="Replica#b",model_name="m"} 2.0' in page
