"""Other weights for a server that runs: two pools, two gateways, processes that die meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.serve.test_split import KEY, MODEL, answers, mixed_requests
from thornback.contracts import EngineConfig, Request, SamplingParams

pytestmark = pytest.mark.full
BACK_S = 150.0


@pytest.fixture(scope="module")
def models(byte_model, tmp_path_factory) -> list[Path]:
    """By version."""
    from transformers import AutoTokenizer

    from thornback.train.build import build_model

    tokenizer, directory = AutoTokenizer.from_pretrained(byte_model), tmp_path_factory.mktemp("weights")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 8192}
    others = (
        build_model(directory / str(seed), tokenizer, vocab_size=len(tokenizer), seed=seed, **sizes)
        for seed in (1, 2, 3)
    )
    return [byte_model, *others]


@pytest.fixture(scope="module")
def server(serve, byte_model):
    return serve(
        byte_model,
        *("--pd", "gateway_replicas=2", "weight_updates=true", f"served_model_name={MODEL}", f"api_keys=[{KEY}]"),
        *("threads_per_replica=1", "split_tokens=8", "engine.max_model_len=2048"),
    )


def update(server, model: Path | str, **more) -> httpx.Response:
    return server.http().post("/update_weights_from_disk", json={"model_path": str(model), **more}, timeout=120)


PROMPT = tuple(range(3, 60))


def says(server, max_tokens: int = 12) -> tuple[str, str]:
    """The version, and the text, of one answer; from a gateway that has just started not at once."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": max_tokens, "seed": 5, "ignore_eos": True}
    deadline = time.monotonic() + BACK_S
    while (answer := server.http().post("/v1/completions", json=body)).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-thornback-weight-version"], answer.json()["choices"][0]["text"]


def text_of(model: Path, max_tokens: int = 12) -> str:
    """What an engine says that has had these weights from its beginning."""
    from thornback.engine import TorchEngine, generate
    from thornback.serve.text import Text, load_tokenizer

    engine = TorchEngine(str(model), EngineConfig(num_threads=1, num_blocks=64))
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=5)
    (sample,) = generate(engine, [Request("r", PROMPT, sampling)])["r"]
    return Text(load_tokenizer(str(model))).decode(sample.token_ids.tolist())


def test_what_is_no_weights_of_this_model_is_refused(server, models, tmp_path):
    from transformers import AutoTokenizer

    from thornback.train.build import build_model

    bad = update(server, tmp_path / "missing")
    assert bad.status_code == 400
    assert "missing" in bad.json()["error"]["message"]
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "intermediate_size": 128}
    wide = build_model(tmp_path / "wide", tokenizer, hidden_size=128, max_position_embeddings=8192, **sizes)
    bad = update(server, wide)
    assert bad.status_code == 400
    assert "not a model like" in bad.json()["error"]["message"]
    assert httpx.post(f"{server.url}/update_weights_from_disk", json={}, trust_env=False).status_code == 401
    assert update(server, models[1], in_flight="keep").status_code == 400
    assert says(server)[0] == "0"


def test_all_replicas_answer_with_them_and_what_had_begun_is_computed_again(server, models):
    assert says(server) == ("0", text_of(models[0]))
    requests = [{**r, "max_tokens": 200, "stream": True} for r in mixed_requests(80) if "n" not in r][:32]
    done: list = []
    load = threading.Thread(target=lambda: done.extend(answers(server, requests, 8)))
    load.start()
    time.sleep(1.0)
    told = update(server, models[1])
    assert told.json() == {"weight_version": 1, "num_replicas": 2}
    wanted = ("1", text_of(models[1]))
    assert wanted[1] != text_of(models[0])
    assert [says(server) for _ in range(8)] == [wanted] * 8  # whichever gateway answers
    load.join()
    assert len(done) == len(requests)
    old = update(server, models[2], weight_version=1)
    assert old.status_code == 400
    assert "give a greater one" in old.json()["error"]["message"]


def test_a_replica_that_comes_later_has_them_although_their_reader_died(server, models):
    """The gateway that read them into the object store is killed, then each replica is."""
    assert update(server, models[2], weight_version=7).json()["weight_version"] == 7
    wanted = ("7", text_of(models[2]))
    for pid in server.replica_pids("Gateway"):
        os.kill(pid, signal.SIGKILL)
    for deployment in ("Decode", "Prefill"):
        (pid,) = server.replica_pids(deployment)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + BACK_S
        while not (set(server.replica_pids(deployment)) - {pid}) or len(server.engines()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert [says(server) for _ in range(8)] == [wanted] * 8
    assert update(server, models[2]).json()["weight_version"] == 8  # one more than is known to be there


def test_what_has_begun_finishes_with_the_weights_that_it_began_with(server, models):
    """Under load: every answer is of one version as a whole."""
    begun = says(server)[0]
    after = str(int(begun) + 1)
    wanted = {begun: text_of(models[2], 300), after: text_of(models[3], 300)}
    said, over = [], threading.Event()

    def client() -> None:
        while not over.is_set():
            said.append(says(server, 300))

    clients = [threading.Thread(target=client) for _ in range(6)]
    for thread in clients:
        thread.start()
    try:
        time.sleep(1.0)
        told = update(server, models[3], in_flight="finish")
        assert told.json() == {"weight_version": int(after), "num_replicas": 2}
        assert says(server, 300) == (after, wanted[after])
    finally:
        over.set()
        for thread in clients:
            thread.join()
    assert {version for version, _ in said} == {begun, after}
    assert all(text == wanted[version] for version, text in said)
