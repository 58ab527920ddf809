"""What is wrong with a request is said in OpenAI's form, and nothing that is not understood is ignored."""

from __future__ import annotations

import concurrent.futures

import openai
import pytest

MODEL = "tiny"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
TEXT = {"model": MODEL, "prompt": "a", "max_tokens": 2}

WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}


def refused(http, path, body, status=400):
    """The error's fields; its form is checked."""
    if isinstance(body, dict):
        answer = http.post(path, json=body)
    else:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert set(error) == {"error"}
    assert set(error["error"]) == {"message", "type", "param", "code"}
    return error["error"]


@pytest.mark.parametrize(
    ("more", "param", "code", "words"),
    [
        ({"temperature": -1}, "temperature", "invalid_value", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "number"),
        ({"n": 0}, "n", "invalid_value", ""),
        ({"n": 65}, "n", None, "at most 64"),
        ({"tempreture": 1}, "tempreture", "unknown_parameter", "no parameter tempreture"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter", "not supported"),
        ({"ignore_eos": 1}, "ignore_eos", "invalid_value", "boolean"),
        ({"min_tokens": 3}, None, None, "min_tokens"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value", ""),
    ],
)
def test_parameters(http, more, param, code, words):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        error = refused(http, path, {**body, **more})
        assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
        assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({**TEXT, "prompt": ""}, "prompt", ""),
        ({**TEXT, "prompt": []}, "prompt", ""),
        ({**TEXT, "prompt": [1, "a"]}, "prompt", ""),
        ({**TEXT, "prompt": [100000]}, "prompt", "vocabulary"),
        ({**TEXT, "prompt": "a" * 9000}, None, "9000 tokens"),
        ({**TEXT, "best_of": 2}, "best_of", "not supported"),
        ({**TEXT, "max_tokens": 0}, None, "echo"),
        ({"model": MODEL}, "prompt", "missing"),
        (b"{not json", None, "JSON"),
        (b"\xff\xfe", None, "JSON"),
        (b"[]", None, "JSON object"),
        (b"", None, "JSON object"),
    ],
)
def test_completions(http, body, param, words):
    error = refused(http, "/v1/completions", body)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"top_logprobs": 3}, "needs logprobs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
            "schema",
        ),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    ],
)
def test_chat(http, more, words):
    assert words in refused(http, "/v1/chat/completions", {**CHAT, **more})["message"]
    # A stream that cannot begin is an HTTP error, not an event.
    assert words in refused(http, "/v1/chat/completions", {**CHAT, **more, "stream": True})["message"]


def test_what_is_not_there(http):
    assert refused(http, "/v1/completions", {**TEXT, "model": "gpt"}, 404)["code"] == "model_not_found"
    assert http.get("/v1/models/gpt").status_code == 404
    assert http.get("/nowhere").json()["error"]["message"]
    assert http.get("/v1/completions").status_code == 405


def test_keys(server, http):
    for sent in ("Bearer", "Bearer wrong", "Bearer secret-ke", "Bearer é", "Basic secret-key", "secret-key"):
        headers = {"Authorization": sent.encode()}
        answer = http.post("/v1/completions", json=TEXT, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert http.get("/v1/models", headers={"Authorization": "Bearer another-key"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client().with_options(api_key="wrong").models.list()
    for path in ("/health", "/metrics", "/openapi.json"):
        assert http.get(path, headers={"Authorization": ""}).status_code == 200


def test_a_body_that_is_too_large(http):
    refused(http, "/v1/completions", {**TEXT, "prompt": "a" * 1_000_001}, 413)

    def parts():
        for _ in range(20):
            yield b"a" * 100_000

    answer = http.post("/v1/completions", content=parts())
    assert answer.status_code == 413


def test_more_than_the_server_takes(server, http):
    """64 samples may be in work and 8 requests wait: of 20 requests for 64 samples, 9 are taken."""
    body = {**TEXT, "max_tokens": 200, "n": 64, "ignore_eos": True}

    def one(_):
        with server.http() as own:
            return own.post("/v1/completions", json=body)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 9
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["Retry-After"]) >= 1
    assert full.json()["error"]["type"] == "rate_limit_error"
    assert http.post("/v1/completions", json=TEXT).status_code == 200  # and it has recovered


@pytest.mark.parametrize(("seconds", "status"), [(5e-324, 504), (60, 200)])
def test_a_requests_own_deadline(http, seconds, status):
    answer = http.post("/v1/completions", json={**TEXT, "request_timeout_s": seconds})
    assert answer.status_code == status
    if status == 504:
        assert answer.json()["error"]["type"] == "timeout_error"
