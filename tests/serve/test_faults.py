"""What happens to requests when a replica dies under them."""

from __future__ import annotations

import os
import signal
import threading
import time

import openai
import pytest

MODEL = "tiny"


@pytest.fixture(scope="module")
def fragile(serve, byte_model):
    return serve(byte_model, f"served_model_name={MODEL}", "threads_per_replica=1")


def kill_replica_after(server, seconds):
    (pid,) = server.replica_pids()
    threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)).start()
    return pid


@pytest.mark.full
def test_a_stream_goes_on_with_another_replica(fragile):
    client = fragile.client()
    asked = {"model": MODEL, "prompt": "go on", "max_tokens": 1500, "seed": 1, "extra_body": {"ignore_eos": True}}
    undisturbed = client.completions.create(**asked).choices[0].text
    before = fragile.metric("vllm:generation_tokens_total")
    text, lost = "", None
    for chunk in client.completions.create(**asked, stream=True):
        text += chunk.choices[0].text
        if lost is None:
            lost = kill_replica_after(fragile, 0)
    assert text == undisturbed
    assert fragile.metric("vllm:generation_tokens_total") - before == 1500
    assert fragile.replica_pids() != [lost]


@pytest.mark.full
def test_a_request_that_cannot_go_on_says_so(fragile):
    client = fragile.client()
    stream = client.completions.create(
        model=MODEL, prompt="go on", max_tokens=4000, n=8, stream=True, extra_body={"ignore_eos": True}
    )
    kill_replica_after(fragile, 0.5)
    began = time.monotonic()
    with pytest.raises(openai.APIError, match="lost"):
        for _ in stream:
            pass
    assert time.monotonic() - began < 60
    # The next one waits for the new replica.
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=3).choices[0].finish_reason
