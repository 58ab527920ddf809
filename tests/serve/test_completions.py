"""`/v1/completions` through a real server."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from thornback.engine import load_model, sequence_logprobs

MODEL = "tiny"


@pytest.fixture(scope="module")
def tokenizer(byte_model):
    return AutoTokenizer.from_pretrained(byte_model)


def streamed_text(chunks, n=1):
    """Each choice's text, and its finish reason, which must come once and last."""
    texts, reasons = [""] * n, [None] * n
    for chunk in chunks:
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    return texts, reasons


def test_streams_say_what_whole_answers_say(client):
    asked = {"model": MODEL, "prompt": "Grüße, 世界 😀", "max_tokens": 60, "seed": 5, "n": 3}
    whole = client.completions.create(**asked)
    texts, reasons = streamed_text(client.completions.create(**asked, stream=True), 3)
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3


def test_echo_of_characters_that_take_several_tokens(client):
    prompt = "é€😀 end"
    for chosen in (prompt, list(range(10, 14))):
        whole = client.completions.create(model=MODEL, prompt=chosen, echo=True, max_tokens=3, seed=1)
        again = client.completions.create(model=MODEL, prompt=chosen, echo=True, max_tokens=3, seed=1, stream=True)
        assert streamed_text(again)[0] == [whole.choices[0].text]
    assert client.completions.create(model=MODEL, prompt=prompt, echo=True).choices[0].text.startswith(prompt)


def test_prompts_of_every_kind(client, tokenizer):
    texts = ["one", "two and more"]
    ids = [tokenizer(text).input_ids for text in texts]
    asked = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    singles = [client.completions.create(prompt=text, **asked).choices[0].text for text in texts]
    for prompts in (texts, ids):
        answer = client.completions.create(prompt=prompts, **asked)
        assert [choice.text for choice in answer.choices] == singles
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(prompt=ids[0], **asked).choices[0].text == singles[0]
    answer = client.completions.create(prompt=texts, n=2, **asked)
    assert [choice.text for choice in answer.choices] == [singles[0], singles[0], singles[1], singles[1]]


def test_the_prompts_log_probabilities_as_evaluations_need_them(client, tokenizer, byte_model):
    """lm-eval's local-completions: echo, one token, log-probabilities; token ids in lists."""
    prompts = [tokenizer(text).input_ids for text in ("the first text", "another")]
    answer = client.completions.create(model=MODEL, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    model = load_model(byte_model)
    expected, _ = sequence_logprobs(model, [np.asarray(p) for p in prompts], [1, 1])
    got = [choice.logprobs.token_logprobs for choice in answer.choices]
    assert [scores[0] for scores in got] == [None, None]
    assert np.allclose(np.concatenate([scores[1:-1] for scores in got]), expected.detach().numpy(), atol=1e-4)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        scores = choice.logprobs
        assert scores.tokens == [tokenizer.decode([i]) for i in prompt] + scores.tokens[-1:]
        assert scores.text_offset == [len("".join(scores.tokens[:i])) for i in range(len(scores.tokens))]
        logits = model_logits(model, prompt)
        best = [tokenizer.decode([int(i)]) for i in logits.argmax(-1)]
        assert [max(top, key=top.get) for top in scores.top_logprobs[1:]] == best


def model_logits(model, prompt):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    with torch.inference_mode():
        return plain(torch.tensor([prompt])).logits[0]


def test_scoring_a_prompt_without_an_answer(client):
    answer = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == "abc"
    assert len(answer.choices[0].logprobs.token_logprobs) == 3
    assert answer.usage.completion_tokens == 0


def test_stop_strings_across_tokens_are_not_shown(client):
    asked = {"model": MODEL, "prompt": "stop", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**asked).choices[0].text
    stop = free[7:11]  # four tokens
    end = free.index(stop)
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=["never in it", stop], stream=stream)
        texts, reasons = streamed_text(answer) if stream else ([answer.choices[0].text], ["stop"])
        assert texts == [free[:end]]
        assert reasons == ["stop"]


def test_a_stop_string_that_never_ends_is_shown_at_last(client):
    asked = {"model": MODEL, "prompt": "stop", "max_tokens": 10, "temperature": 0}
    free = client.completions.create(**asked).choices[0].text
    held = client.completions.create(**asked, stop=free[-2:] + "\x00never").choices[0]
    assert held.text == free
    assert held.finish_reason == "length"


def test_stop_tokens_and_minimum(client, tokenizer):
    asked = {"model": MODEL, "prompt": "x", "max_tokens": 30, "temperature": 0, "logprobs": 0}
    free = client.completions.create(**asked).choices[0]
    third = tokenizer.convert_tokens_to_ids(free.logprobs.tokens[2])
    if third is None or third == tokenizer.unk_token_id:
        third = tokenizer(free.logprobs.tokens[2]).input_ids[0]
    stopped = client.completions.create(**asked, extra_body={"stop_token_ids": [third]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].model_extra["stop_reason"] == third
    assert stopped.usage.completion_tokens <= 3
    later = client.completions.create(**asked, extra_body={"stop_token_ids": [third], "min_tokens": 10})
    assert later.usage.completion_tokens > 10 or later.choices[0].finish_reason == "length"
    end = client.completions.create(**asked, extra_body={"ignore_eos": True, "min_tokens": 30})
    assert end.usage.completion_tokens == 30


@pytest.mark.parametrize("option", [{"top_k": 1}, {"min_p": 1.0}])
def test_truncation_to_the_best_is_greedy(client, option):
    asked = {"model": MODEL, "prompt": "top", "max_tokens": 12}
    greedy = client.completions.create(**asked, temperature=0).choices[0].text
    assert client.completions.create(**asked, temperature=1, extra_body=option).choices[0].text == greedy


def test_seeds(client):
    asked = {"model": MODEL, "prompt": ["same", "same"], "max_tokens": 12}
    first, second = (client.completions.create(**asked, seed=7) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    free = client.completions.create(**asked)
    assert free.choices[0].text != free.choices[1].text  # no seed: prompts that are alike get draws of their own


def test_usage_in_a_last_chunk(client):
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="abc",
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (3, 5)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_log_probabilities_of_the_answer(client):
    scores = client.completions.create(model=MODEL, prompt="p", max_tokens=5, logprobs=3, seed=2).choices[0].logprobs
    for token, value, top in zip(scores.tokens, scores.token_logprobs, scores.top_logprobs, strict=True):
        assert math.isclose(top[token], value, abs_tol=1e-5)
        assert value <= 0
        assert 1 <= len(top) <= 4


def test_who_answered(http):
    for stream in (False, True):
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 1, "stream": stream})
        assert answer.headers["x-thornback-weight-version"] == "0"
        assert '"system_fingerprint":"weights-0"' in answer.text
