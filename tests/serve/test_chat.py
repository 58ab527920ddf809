"""`/v1/chat/completions` through a real server."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

MODEL = "tiny"
MESSAGES = [{"role": "user", "content": "Add one and two."}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "kind": {"enum": ["x", "y"]}},
            "required": ["a", "kind"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "other"}}


def gathered(chunks):
    """(content, [[name, arguments]], finish reason) of a stream of one choice."""
    content, calls, reason = "", [], None
    for chunk in chunks:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                if part.id:
                    calls.append([part.function.name, ""])
                calls[part.index][1] += part.function.arguments or ""
            reason = choice.finish_reason or reason
    return content, calls, reason


def test_a_conversation_is_rendered_by_the_models_template(client, byte_model):
    messages = [{"role": "system", "content": "Be kind."}, *MESSAGES]
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    asked = {"model": MODEL, "max_tokens": 20, "temperature": 0}
    plain = client.completions.create(prompt=prompt, **asked)
    answer = client.chat.completions.create(messages=messages, **asked)
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert client.chat.completions.create(messages=parts, **asked).choices[0].message == answer.choices[0].message


def test_streams_say_what_whole_answers_say(client):
    asked = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 40, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    content, _, reason = gathered(chunks)
    assert (content, reason) == (whole.choices[0].message.content, whole.choices[0].finish_reason)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all("error" not in (chunk.model_extra or {}) for chunk in chunks)


def test_log_probabilities(client):
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "seed": 3, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    scores = whole.choices[0].logprobs.content
    assert len(scores) == whole.usage.completion_tokens
    assert all(len(score.top_logprobs) == 2 for score in scores)
    streamed = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed += choice.logprobs.content if choice.logprobs else []
    assert [score.token for score in streamed] == [score.token for score in scores]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_follows_a_schema(client, stream):
    schema = ADD["function"]["parameters"]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=200,
        seed=1,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
    )
    content = gathered(answer)[0] if stream else answer.choices[0].message.content
    value = json.loads(content)
    assert set(value) == {"a", "kind"}
    assert value["kind"] in ("x", "y")


def test_an_answer_that_is_an_object(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=100, seed=4, response_format={"type": "json_object"}
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_must_be_made(client, choice, stream):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[ADD], tool_choice=choice, max_tokens=300, seed=2, stream=stream
    )
    if stream:
        content, calls, reason = gathered(answer)
    else:
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        content = message.content or ""
        calls = [[call.function.name, call.function.arguments] for call in message.tool_calls]
    assert (content, reason) == ("", "tool_calls")
    assert len(calls) == 1
    assert calls[0][0] == "add"
    assert set(json.loads(calls[0][1])) == {"a", "kind"}


def test_a_call_of_one_of_several(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[ADD, OTHER], tool_choice="required", max_tokens=300, seed=2
    )
    assert answer.choices[0].message.tool_calls[0].function.name in ("add", "other")


def test_what_a_call_became_goes_back_in(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": true}'}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    asked = {"model": MODEL, "max_tokens": 5, "tools": [ADD]}
    answer = client.chat.completions.create(messages=history, **asked)
    assert answer.choices[0].finish_reason in ("stop", "length")
    shorter = client.chat.completions.create(messages=MESSAGES, **asked)
    assert answer.usage.prompt_tokens > shorter.usage.prompt_tokens
    without = client.chat.completions.create(messages=MESSAGES, tool_choice="none", **asked)
    assert without.usage.prompt_tokens < shorter.usage.prompt_tokens


def test_how_long_an_answer_may_be(client):
    asked = {"model": MODEL, "messages": MESSAGES, "extra_body": {"ignore_eos": True}}
    for limits in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 9, "max_completion_tokens": 3}):
        answer = client.chat.completions.create(**asked, **limits)
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"
    for limits in ({}, {"max_tokens": 100_000}):  # as far as the model's context reaches
        filler = [{"role": "user", "content": "a" * 8000}]
        answer = client.chat.completions.create(**{**asked, "messages": filler}, **limits)
        assert answer.usage.total_tokens == 8192
        assert answer.choices[0].finish_reason == "length"


def test_models(client, server):
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL]
    assert client.models.retrieve(MODEL).model_extra["max_model_len"] == 8192
