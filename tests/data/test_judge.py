"""A judge behind an HTTP endpoint: what it says counts, what fails is told, and nothing is asked twice."""

from __future__ import annotations

import json
import pickle
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from thornback.contracts import Completion, ConfigError, Prompt, RewardError
from thornback.data import ArithmeticTask, JudgeReward, RuleScorer, as_reward, check_failures


class Judge(BaseHTTPRequestHandler):
    """Gives as many points as the answer has letters; fails as the answer's text says."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.lock:
            server.questions.append(question)
            server.keys.append(self.headers["Authorization"])
            server.at_once += 1
            server.most = max(server.most, server.at_once)
        answer = question.partition("Answer:\n")[2].partition("\n")[0]
        busy = "busy" in answer and server.questions.count(question) <= 2
        if "slow" in answer:
            time.sleep(0.3)
        with server.lock:
            server.at_once -= 1
        said = "I cannot tell." if "silent" in answer else f"Score: 3? No.\nScore: {len(answer)}"
        reply = {
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}],
            "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100},
        }  # fmt: skip
        status = 503 if busy else 400 if "bad" in answer else 200
        content = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.lock, server.questions, server.keys, server.at_once, server.most = threading.Lock(), [], [], 0, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def judge(server, **options) -> JudgeReward:
    return JudgeReward(f"http://127.0.0.1:{server.server_port}/v1", "judge", **options)


def answers(*texts: str) -> list[Completion]:
    return [Completion(Prompt(t, ({"role": "user", "content": "2+2=?"},), "4"), t, 5, "stop") for t in texts]


def test_scores_are_what_it_says_last(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    scores = judge(server, api_key_variable="JUDGE_KEY").score_all(answers("four", "it is four"))
    assert scores == [4.0, 10.0]
    assert "2+2=?" in server.questions[0]
    assert "Reference answer:\n4" in server.questions[0]
    assert set(server.keys) == {"Bearer secret"}


def test_what_fails_at_first_is_tried_again_and_what_fails_for_good_fails_alone(server):
    good, busy, bad, silent = judge(server).score_all(answers("four", "busy", "bad", "silent"))
    assert (good, busy) == (4.0, 4.0)
    assert "400" in str(bad)
    assert str(silent) == "heard no score from the judge, but 'I cannot tell.'."


def test_many_are_asked_at_once_but_not_more_than_allowed(server):
    began = time.monotonic()
    scores = judge(server, concurrency=8).score_all(answers(*(f"slow{i:02d}" for i in range(16))))
    assert scores == [6.0] * 16
    assert time.monotonic() - began < 2.5
    assert 4 <= server.most <= 8


def test_the_same_is_asked_once_also_by_other_processes(server, tmp_path):
    cache = str(tmp_path / "made" / "judged.sqlite")
    first = judge(server, cache=cache)
    assert first.score_all(answers("four", "four", "five!")) == [4.0, 4.0, 5.0]
    assert first.score_all(answers("four")) == [4.0]
    assert judge(server, cache=cache).score_all(answers("five!", "six")) == [5.0, 3.0]
    assert len(server.questions) == 3
    assert judge(server, cache=cache, temperature=1.0).score_all(answers("four")) == [4.0]
    assert len(server.questions) == 4


@pytest.mark.parametrize(("budget", "asked"), [({"max_requests": 2}, 2), ({"max_tokens": 250}, 3)])
def test_a_budget_is_kept(server, budget, asked):
    judged = judge(server, concurrency=1, **budget).score_all(answers("a", "bb", "ccc", "dddd", "eeeee"))
    assert len(server.questions) == asked
    assert judged[:asked] == [1.0, 2.0, 3.0][:asked]
    assert all("has spent its budget of" in str(failure) for failure in judged[asked:])


def test_as_a_reward_of_a_run(server):
    options = {"base_url": f"http://127.0.0.1:{server.server_port}/v1", "model": "judge"}
    reward = as_reward("helpful", "thornback.data:JudgeReward", options=options)
    assert reward.range == (0.0, 10.0)
    scorer = RuleScorer(ArithmeticTask(), [reward])
    scores = scorer.score(answers("four", "silent", "much longer than it may be"))
    np.testing.assert_array_equal(scores["helpful"], [4.0, np.nan, np.nan])
    assert {cause: count for cause, (count, _) in scorer.failures.items()} == {
        "The reward helpful heard no score from the judge, but 'I cannot tell.'": 1,
        "The reward helpful returned 26.0, but its range is [0.0, 10.0]": 1,
    }
    with pytest.raises(RewardError, match=r"1 of 3 times, first on prompt silent"):
        check_failures(scorer.failures, 3, 0.5)


def test_it_travels_to_where_it_judges(server, tmp_path):
    cache = str(tmp_path / "judged.sqlite")
    here = judge(server, cache=cache)
    assert here.score_all(answers("four")) == [4.0]
    there = pickle.loads(pickle.dumps(here))
    assert there.score_all(answers("four")) == [4.0]
    assert len(server.questions) == 1


def test_a_judge_that_is_not_there(server):
    gone = JudgeReward("http://127.0.0.1:9/v1", "judge", retries=0, timeout=2.0)
    (failure,) = gone.score_all(answers("four"))
    assert "Connection" in str(failure)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"template": "{nothing}"}, "nothing"), ({"pattern": "("}, "cannot be used"), ({"pattern": "x"}, "needs a group")],
)
def test_what_cannot_be_asked_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        JudgeReward("http://127.0.0.1/v1", "judge", **options)


def test_options_are_for_classes():
    with pytest.raises(ConfigError, match="cannot be made with its options"):
        as_reward("helpful", "thornback.data:JudgeReward", options={"modle": "x"})
    with pytest.raises(ConfigError, match="is no class"):
        as_reward("r", lambda completion: 1.0, options={"a": 1})
