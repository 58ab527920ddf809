"""A server behind HAProxy: what clients see is the same, when they leave and when a gateway dies too."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest

from tests.serve.test_split import KEY, MODEL, answers, check_all_free, mixed_requests

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def behind(serve, byte_model):
    return serve(
        byte_model, "haproxy=true", "gateway_replicas=2", "threads_per_replica=1", f"served_model_name={MODEL}"
    )


def test_it_is_haproxy(behind):
    import psutil

    names = {process.name() for process in psutil.Process(behind.process.pid).children(recursive=True)}
    assert any("haproxy" in name for name in names), names
    (listening,) = {c.laddr.ip for c in psutil.net_connections() if c.laddr.port == int(behind.url.rpartition(":")[2])}
    assert listening == "127.0.0.1"


def test_answers_are_the_same(behind, server):
    requests = mixed_requests(40)
    assert answers(behind, requests, 8) == answers(server, requests, 8)


def test_errors_arrive_as_they_are(behind):
    bad = httpx.post(f"{behind.url}/v1/completions", json={"model": "none", "prompt": "a"}, trust_env=False)
    assert (bad.status_code, bad.json()["error"]["code"]) == (404, "model_not_found")


def test_a_client_that_leaves_frees_everything(behind):
    body = {"model": MODEL, "prompt": [7] * 100, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    url = f"{behind.url}/v1/completions"
    before = behind.metric("vllm:generation_tokens_total")
    with httpx.Client(trust_env=False) as client, client.stream("POST", url, json=body, timeout=60) as response:
        next(response.iter_bytes())
    check_all_free(behind)
    assert behind.metric("vllm:generation_tokens_total") - before < 2000


def test_a_killed_gateway_takes_only_its_own_requests(behind):
    pid = behind.replica_pids("Gateway")[0]
    os.kill(pid, signal.SIGKILL)
    deadline, good = time.monotonic() + 60, 0
    while good < 20:
        assert time.monotonic() < deadline
        try:
            answer = httpx.get(f"{behind.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, trust_env=False)
        except httpx.HTTPError:
            answer = None
        good = good + 1 if answer is not None and answer.status_code == 200 else 0
        time.sleep(0.05)


def test_it_stops_soon(behind):
    """Not after the half minute that Ray Serve leaves to load balancers that are slow to notice."""
    began = time.monotonic()
    behind.process.send_signal(signal.SIGINT)
    behind.process.wait(60)
    assert time.monotonic() - began < 20
