"""The client of the serving benchmarks, and what follows from what it measures."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import overload, serve_pd
from benchmarks.peers.http_client import Load, ask, percentiles

LOAD = Load(num_requests=6, at_once=2, prompt_tokens=4, output_tokens=3, vocab_size=50, seed=1)


class Handler(BaseHTTPRequestHandler):
    """Three tokens, 200 ms apart; every third request is refused."""

    protocol_version = "HTTP/1.1"
    count = 0
    prompts: list[list[int]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.prompts.append(asked["prompt"])
        Handler.count += 1
        if Handler.count % 3 == 0:
            self.send_response(429)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(3):
            self.say({"choices": [{"text": "a"}]})
            time.sleep(0.2)
        self.say({"choices": [], "usage": {"completion_tokens": 3}})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def say(self, chunk: dict) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url():
    Handler.count, Handler.prompts = 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("rate", [0.0, 20.0])
def test_the_client(url, rate):
    load = Load(**{**LOAD.__dict__, "rate": rate})
    answers = ask(url, "m", load)
    answered = [r for r in answers["requests"] if "end" in r]
    assert len(answered) == 4
    assert sum("refused" in r for r in answers["requests"]) == 2
    for request in answered:
        assert 0.03 < request["second"] - request["first"] < 1
        assert request["end"] <= request["at"] <= answers["seconds"]
    assert sorted(Handler.prompts) == sorted(load.prompts())
    assert {len(prompt) for prompt in Handler.prompts} == {4}


def test_a_server_that_says_too_little_fails_the_client(url):
    with pytest.raises(RuntimeError, match="3 tokens were answered, not 4"):
        ask(url, "m", Load(**{**LOAD.__dict__, "output_tokens": 4, "num_requests": 1}))


def test_percentiles():
    assert percentiles([float(i) for i in range(100, 0, -1)]) == {"p50": 51.0, "p90": 91.0}


def test_ratios_of_serve_pd():
    times = {
        serve_pd.OURS: (0.10, 0.12, 0.5, 10.0),
        serve_pd.OURS_WHOLE: (0.09, 0.11, 0.4, 8.0),
        serve_pd.VLLM: (0.15, 0.185, 0.6, 20.0),
        serve_pd.VLLM_WHOLE: (0.14, 0.165, 0.5, 18.0),
        serve_pd.THEIRS: (0.20, 0.24, 0.8, 40.0),
        serve_pd.THEIRS_WHOLE: (0.15, 0.19, 0.6, 30.0),
    }
    rows = [
        {"system": system, "at_once": at_once, "ttft": first, "second": second, "tpot": 0.01, "startup": startup}
        | {"p50": end, "p90": 2 * end, "requests_per_second": 1 / end}
        for system, (first, second, end, startup) in times.items()
        for at_once in (1, 8)
    ]
    engines = {"thornback": {"p50": 0.3, "p90": 0.4}, "vLLM": {"p50": 0.4, "p90": 0.4}}
    found = serve_pd.ratios(rows, engines)
    assert found["handover"] == pytest.approx(0.01 / 0.05)
    assert found["ttft"] == pytest.approx(0.5)
    assert found["vllm_handover"] == pytest.approx(0.02 / 0.05)
    assert found["vllm_ttft"] == pytest.approx(0.75)
    assert found["overhead"] == pytest.approx(0.2 / 0.4)
    assert found["overhead_p90"] == pytest.approx(0.6 / 1.2)
    assert found["throughput"] == pytest.approx(0.8 / 0.5)
    assert found["startup"] == pytest.approx(0.25)


def test_what_is_refused_is_no_answer():
    answers = {"seconds": 2.0, "requests": [{"end": 1.0}, {"refused": 0.1}, {"end": 1.5}, {"refused": 0.2}]}
    assert overload.answered_rate(answers) == 1.0


def test_ratios_of_overload():
    load = Load(num_requests=120, at_once=0, prompt_tokens=8, output_tokens=256, vocab_size=50, seed=1, rate=2.0)
    accepted = [{"first": 1.0, "second": 1.1, "end": 11.0, "at": at} for at in range(11, 71, 2)]
    answers = {"requests": [*accepted, *[{"refused": 0.01}] * 90], "seconds": 70.0}
    memory = overload.Memory(0)
    memory.values = [100] * 10 + [200] * 50 + [210]
    found = overload.ratios(load, answers, memory, peak=0.5)
    assert found["ttft_p90"] == pytest.approx(1.0 / overload.FIRST_TOKEN_S)
    assert found["tpot_p90"] == pytest.approx(9.9 / 254 / overload.TOKEN_S)
    assert found["refusal_p90"] == 0.01
    assert found["memory"] == pytest.approx(1.05)
    assert found["throughput"] == pytest.approx(1.0, abs=0.05)  # one every two seconds, as at the peak
