"""Function calling: made-up requests, ToolRL's rows, and how near calls are to those wanted."""

from __future__ import annotations

import json
import math
from itertools import cycle, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thornback.contracts import Completion, ConfigError, Prompt
from thornback.data import ToolsTask, character_tokenizer, load_task
from thornback.data.tasks.tools import Arguments, ReplyFormat, Tool, argument_match, calls_in, name_match
from thornback.data.tasks.tools_requests import requests

SUNNY = '{"name": "weather", "parameters": {"city": "Ulm", "day": "today"}}'
TRAIN = '{"name": "train", "parameters": {"to": "Bonn"}}'


def reply(*calls, thought="hm", tail=""):
    return f"<think>{thought}</think>\n<tool_call>\n" + "\n".join(calls) + f"\n</tool_call>{tail}"


def completion(text, wanted):
    return Completion(Prompt("k", ({"role": "user", "content": "?"},), wanted), text, 9, "stop")


@pytest.mark.parametrize(
    ("text", "tool", "arguments"),
    [
        (reply(SUNNY), 1.0, 1.0),
        (reply(SUNNY.replace("today", "Monday")), 1.0, 2 / 3),
        (reply(SUNNY.replace("city", "town")), 1.0, (1 / 3 + 1) / 3),
        (reply(SUNNY.replace("weather", "traffic")), 0.0, 0.0),
        (reply(SUNNY, SUNNY), 0.5, 1.0),
        (reply(SUNNY.replace("today", "Monday"), SUNNY), 0.5, 1.0),  # the better one counts
        (reply(TRAIN, SUNNY), 0.5, 1.0),
        (reply('{"name": "weather"}'), 1.0, 0.0),
        (reply("not json"), 0.0, 0.0),
        (reply("[" * 10000), 0.0, 0.0),
        ("<think>hm</think><response>No idea.</response>", 0.0, 0.0),
    ],
)
def test_calls_are_scored_by_how_near_they_are(text, tool, arguments):
    said = completion(text, reply(SUNNY))
    assert Tool()(said) == pytest.approx(tool)
    assert Arguments()(said) == pytest.approx(arguments)
    assert ToolsTask().is_correct(said) == (tool == arguments == 1.0)


def test_calls_may_come_in_any_order():
    said = completion(reply(SUNNY, TRAIN), reply(TRAIN, SUNNY))
    assert Tool()(said) == Arguments()(said) == 1.0
    assert ToolsTask().is_correct(said)


def test_no_call_is_right_where_none_was_wanted():
    wanted = "<think>hm</think><response>Hello.</response>"
    good = completion("<think>well</think><response>Hi.</response>", wanted)
    assert Tool()(good) == 1.0
    assert Arguments()(good) is None
    assert ToolsTask().is_correct(good)
    assert not ToolsTask().is_correct(completion(reply(SUNNY), wanted))


CALLS = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from("ab"), "parameters": st.dictionaries(st.sampled_from("xy"), st.integers(0, 2))}
    ),
    max_size=4,
)


@given(CALLS, CALLS, st.randoms())
def test_matches_know_no_order_and_stay_in_range(made, wanted, random):
    shuffled = random.sample(made, len(made))
    assert name_match(made, wanted) == name_match(shuffled, wanted) == name_match(wanted, made)
    assert 0.0 <= name_match(made, wanted) <= 1.0
    if wanted:
        assert math.isclose(argument_match(made, wanted), argument_match(shuffled, wanted))
        assert 0.0 <= argument_match(made, wanted) <= 1.0 + 1e-9
        assert math.isclose(argument_match(wanted, wanted), 1.0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (reply(SUNNY), 1.0),
        (reply(SUNNY, tail="<response>Sunny.</response>"), 1.0),
        (reply(SUNNY, tail="Sunny."), 0.0),
        (reply("not json"), 0.0),
        ("<think>hm</think>", 0.0),
        ("Sunny.", 0.0),
    ],
)
def test_a_reply_is_a_thought_and_then_calls_or_a_response(text, score):
    assert ReplyFormat()(completion(text, "")) == score


def test_made_up_requests():
    task = load_task("tools", {"num_train": 200, "num_test": 60})
    train, test = list(task.prompts("train")), list(task.prompts("test"))
    assert (len(train), len(test)) == (200, 60)
    assert {p.key for p in train}.isdisjoint(p.key for p in test)
    for prompt, request in zip(train, task.requests("train"), strict=True):
        listed = dict(request.listed)
        for call in calls_in(prompt.answer):
            assert tuple(call["parameters"]) == listed[call["name"]]
            assert all(value in prompt.messages[0]["content"] for value in call["parameters"].values())
        best = completion(prompt.answer, prompt.answer)
        assert [reward(best) for reward in task.rewards] == [1.0, 1.0, 1.0]
    assert [p.key for p in load_task("tools", {"num_train": 200, "seed": 1}).prompts("train")] != [p.key for p in train]


def test_no_more_requests_than_there_are(monkeypatch):
    few = list(islice(requests(1, 1, [0]), 20))
    monkeypatch.setattr("thornback.data.tasks.tools.requests", lambda *_: cycle(few))
    with pytest.raises(ConfigError, match=r"has only about \d+ train requests of 2 calls among 3 tools, but 40 were"):
        list(ToolsTask(num_train=40).prompts("train"))
    with pytest.raises(ConfigError, match="num_tools <= 5"):
        ToolsTask(num_tools=6)


def test_the_vocabulary_makes_replies_short_and_changes_no_text():
    task = ToolsTask(num_train=100)
    tokenizer = character_tokenizer(task.words)
    for prompt in task.prompts("train"):
        for text in (prompt.messages[0]["content"], prompt.answer):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.decode(ids) == text
            assert len(ids) < 0.5 * len(text)


def test_demonstrations_are_as_flawed_as_asked_for():
    task = ToolsTask(num_train=100)
    sound = dict.fromkeys(
        ("wrong_tool", "wrong_parameter", "missing", "wrong_value", "wrong_count", "broken_tags"), 0.0
    )
    assert all(d.completion == d.prompt.answer for d in task.demonstrations(50, **sound))
    for flaw in sound:
        spoiled = task.demonstrations(100, **{**sound, flaw: 1.0})
        assert sum(d.completion != d.prompt.answer for d in spoiled) > 50, flaw
    with pytest.raises(ConfigError, match="wrong_tools"):
        task.demonstrations(1, wrong_tools=1.0)


def test_rows_are_read_and_split(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"Weather {i}?"}], "reward_model": {"ground_truth": reply(SUNNY)}}
        for i in range(50)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task("tools", {"path": str(tmp_path / "rows.jsonl"), "held_out_share": 0.3})
    train, test = list(task.prompts("train")), list(task.prompts("test"))
    assert len(train) + len(test) == 50
    assert 5 < len(test) < 25
    assert {p.key for p in train}.isdisjoint(p.key for p in test)
    assert calls_in(train[0].answer) == [json.loads(SUNNY)]
    with pytest.raises(ConfigError, match="made-up requests"):
        task.demonstrations(1)
