"""The recipes are valid, and the task among them judges as it says."""

import json
from pathlib import Path

import pytest

from recipes.tool_use import Calls, ReplyFormat, ToolUse, calls_in
from thornback import cli
from thornback.contracts import Completion, Prompt

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SUNNY = '{"name": "weather", "parameters": {"city": "Ulm", "day": "today"}}'


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_say_what_they_would_run(recipe, capsys):
    assert cli.main(["train", str(recipe), "--dry-run"]) == 0
    assert "This would run:" in capsys.readouterr().out


def reply(*calls, thought="hm", tail=""):
    return f"<think>{thought}</think>\n<tool_call>\n" + "\n".join(calls) + f"\n</tool_call>{tail}"


def completion(text, wanted):
    return Completion(Prompt("k", ({"role": "user", "content": "?"},), wanted), text, 9, "stop")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (reply(SUNNY), 1.0),
        (reply(SUNNY.replace("today", "Monday")), 0.75),
        (reply(SUNNY.replace("weather", "traffic")), 0.0),
        (reply(SUNNY, SUNNY), 0.5),
        (reply("not json"), 0.0),
        ("<think>hm</think><response>No idea.</response>", 0.0),
    ],
)
def test_calls_are_scored_by_how_near_they_are(text, score):
    assert Calls()(completion(text, reply(SUNNY))) == score
    assert ToolUse("anywhere").is_correct(completion(text, reply(SUNNY))) == (score == 1.0)


def test_no_call_is_right_where_none_was_wanted():
    wanted = "<think>hm</think><response>Hello.</response>"
    assert Calls()(completion("<think>well</think><response>Hi.</response>", wanted)) == 1.0


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


def test_rows_are_read_and_split(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"Weather {i}?"}], "reward_model": {"ground_truth": reply(SUNNY)}}
        for i in range(50)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ToolUse(str(tmp_path / "rows.jsonl"), held_out_share=0.3)
    train, test = list(task.prompts("train")), list(task.prompts("test"))
    assert len(train) + len(test) == 50
    assert 5 < len(test) < 25
    assert {p.key for p in train}.isdisjoint(p.key for p in test)
    assert calls_in(train[0].answer) == [json.loads(SUNNY)]
