"""The arithmetic task: right answers, disjoint splits, judged as asked; and its imperfect demonstrations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thornback.contracts import Completion, ConfigError, Prompt, RewardError
from thornback.data import ArithmeticTask, Flaws, RuleScorer, as_reward, check_failures, load_task, make_demonstrations
from thornback.data.rewards import tagged_answer
from thornback.data.tasks.arithmetic import Problem


def completion(text: str, answer: str = "85", num_tokens: int = 20) -> Completion:
    return Completion(Prompt("47+38", ({"role": "user", "content": "47+38=?"},), answer), text, num_tokens, "stop")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 9999), st.sampled_from("+-"), st.integers(0, 9999))
def test_columns_are_written_arithmetic(a: int, op: str, b: int) -> None:
    if op == "-":
        a, b = max(a, b), min(a, b)
    problem = Problem(a, op, b)
    assert problem.answer == eval(f"{a}{op}{b}")
    digits = []
    for column in problem.columns():
        left, result = column.split("=")
        assert eval(left) == int(result)
        digits.append(result)
    assert int("".join([digits[-1], *[d[-1] for d in reversed(digits[:-1])]])) == problem.answer


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("operators", ["+", "+-"])
def test_nothing_held_out_is_trained(seed, operators) -> None:
    options = {"max_digits": 3, "operators": operators, "story_share": 0.5, "num_train": 800, "num_test": 200}
    tasks = [ArithmeticTask(seed=s, **options) for s in (seed, seed + 10)]
    train = {p.canonical for task in tasks for p, _ in task.problems("train")}
    test = {p.canonical for task in tasks for p, _ in task.problems("test")}
    assert not train & test  # not even between seeds
    prompts = list(tasks[0].prompts("train"))
    assert len({p.key for p in prompts}) == len(prompts) == 800
    assert prompts == list(tasks[0].prompts("train"))
    assert prompts != list(tasks[1].prompts("train"))
    assert any("?" in p.messages[0]["content"] and "=" not in p.messages[0]["content"] for p in prompts)


def test_difficulty_is_adjustable_and_bounded() -> None:
    for prompt in ArithmeticTask(min_digits=4, max_digits=5, num_train=50).prompts("train"):
        assert all(4 <= len(number) <= 5 for number in prompt.key.split("+"))
    with pytest.raises(ConfigError, match="allow more digits"):
        list(ArithmeticTask(min_digits=1, max_digits=1, num_train=500).prompts("train"))
    with pytest.raises(ConfigError, match="operators"):
        ArithmeticTask(operators="*")
    with pytest.raises(ConfigError, match="train and test"):
        ArithmeticTask().prompts("validation")


@pytest.mark.parametrize(
    ("text", "correct", "well_formed"),
    [
        ("<think>7+8=15</think><answer>85</answer>", 1, 1),
        (" <think>x</think>\n<answer> 85 </answer> ", 1, 1),
        ("<answer>85</answer>", 1, 0),
        ("<think>7+8=15</think><answer>86</answer>", 0, 1),
        ("<think>a</think><answer>085</answer>", 0, 1),
        ("<think>a<answer>85</answer>", 1, 0),
        ("<think>a</think><answer>85", 0, 0),
        ("<think></think><answer>85</answer>", 1, 0),
        ("<think>a</think><answer>85</answer>!", 1, 0),
        ("<think>a</think><answer>85</answer><answer>85</answer>", 0, 0),
        ("<think>a</think><think>b</think><answer>85</answer>", 1, 0),
        ("85", 0, 0),
        ("", 0, 0),
    ],
)
def test_rewards(text, correct, well_formed) -> None:
    scores = RuleScorer(ArithmeticTask()).score([completion(text)])
    assert (scores["correct"][0], scores["format"][0]) == (correct, well_formed)


def test_brevity_is_a_budget_with_an_optional_slope() -> None:
    def brevity(tokens: int, **options: int) -> float:
        scorer = RuleScorer(ArithmeticTask(budget=24, **options))
        return float(scorer.score([completion("", num_tokens=tokens)])["brevity"][0])

    assert [brevity(n) for n in (1, 24, 25)] == [1, 1, 0]
    assert [brevity(n, margin=8) for n in (24, 26, 32, 60)] == [1, 0.75, 0, 0]


def test_demonstrations_are_of_training_problems_and_as_flawed_as_asked() -> None:
    task = ArithmeticTask(max_digits=3)
    train = {p.key for p in task.prompts("train")}
    made = make_demonstrations(task, 4000, seed=1)
    assert made == make_demonstrations(task, 4000, seed=1)
    assert made != make_demonstrations(task, 4000, seed=2)
    assert {d.prompt.key for d in made} <= train
    right = sum(tagged_answer(d.completion) == d.prompt.answer for d in made) / 4000
    direct = sum("think" not in d.completion for d in made) / 4000
    wordy = sum("done" in d.completion for d in made) / 4000
    assert 0.70 < right < 0.82
    assert 0.12 < direct < 0.18
    assert 0.30 < wordy < 0.38  # of those that reason
    clean = make_demonstrations(task, 500, flaws=Flaws(wrong_column=0, direct=0, wordy=0, broken_tags=0))
    scores = RuleScorer(task).score([Completion(d.prompt, d.completion, 1, "stop") for d in clean])
    assert scores["correct"].all()
    assert scores["format"].all()
    spoiled = make_demonstrations(task, 500, flaws=Flaws(wrong_column=1, direct=0, wordy=0, broken_tags=0))
    wrong = sum(tagged_answer(d.completion) != d.prompt.answer for d in spoiled)
    assert wrong > 450


# A user's own


def halved(c: Completion) -> float:
    return 0.5


def not_for_this(c: Completion) -> float | None:
    return None


def raises(c: Completion) -> float:
    return 1 / 0


def a_string(c: Completion) -> str:
    return "good"


def too_large(c: Completion) -> float:
    return 3.0


class InCelsius:
    range = (-40.0, 40.0)

    def __call__(self, c: Completion) -> float:
        return -12.0


def test_a_users_reward_by_import_path_function_or_class(monkeypatch, tmp_path) -> None:
    (tmp_path / "my_rewards.py").write_text("def third(completion):\n    return 1 / 3\n")
    monkeypatch.chdir(tmp_path)
    rewards = [as_reward("third", "my_rewards:third"), as_reward("half", halved), as_reward("heat", InCelsius)]
    rewards += [as_reward("nothing", not_for_this), as_reward("large", too_large, range=(0, 5))]
    scores = RuleScorer(ArithmeticTask(), rewards).score([completion("<answer>85</answer>")])
    assert scores["third"][0] == pytest.approx(1 / 3)
    assert (scores["half"][0], scores["heat"][0], scores["large"][0]) == (0.5, -12, 3)
    assert scores["nothing"][0] != scores["nothing"][0]
    assert scores["correct"][0] == 1  # the task's verdict, beside whatever rewards there are
    assert rewards[2].range == (-40.0, 40.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises, r"The reward r raised ZeroDivisionError: .*: 1 of 2 times, first on prompt 47\+38"),
        (a_string, "returned 'good', a str; return a number, or None"),
        (too_large, r"returned 3.0, but its range is \[0.0, 1.0\]"),
    ],
)
def test_what_is_no_score_is_counted_and_refused_where_it_is_too_much(function, message) -> None:
    scorer = RuleScorer(ArithmeticTask(), [as_reward("r", function), as_reward("half", halved)])
    scores = scorer.score([completion("x")])
    assert np.isnan(scores["r"][0])
    assert np.isfinite(scores["half"][0])
    with pytest.raises(RewardError, match=message):
        check_failures(scorer.failures, 2, 0.4)
    check_failures(scorer.failures, 2, 0.5)
    scorer.score([])
    assert not scorer.failures


def test_a_verdict_may_be_numpys() -> None:
    class Numpys(ArithmeticTask):
        def is_correct(self, completion):
            return np.bool_(True)

    scorer = RuleScorer(Numpys(), [as_reward("half", halved)])
    assert scorer.score([completion("x")])["correct"].tolist() == [1.0]
    assert not scorer.failures


def test_the_verdict_cannot_be_replaced() -> None:
    with pytest.raises(ConfigError, match="cannot be called correct"):
        RuleScorer(ArithmeticTask(), [as_reward("correct", halved)])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("arithmetics", {}, "There is no task"),
        ("arithmetic", {"digits": 3}, "its options are min_digits"),
        ("no.such.module:Task", {}, "cannot be imported"),
        ("json:Nothing", {}, "has no Nothing"),
    ],
)
def test_unknown_tasks_and_options(name, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_task(name, options)


def test_a_task_by_import_path(monkeypatch, tmp_path) -> None:
    (tmp_path / "my_tasks.py").write_text(
        "from thornback.data import ArithmeticTask\n\nclass Sums(ArithmeticTask):\n    name = 'sums'\n"
    )
    monkeypatch.chdir(tmp_path)
    task = load_task("my_tasks:Sums", {"num_train": 3})
    assert (task.name, len(list(task.prompts("train")))) == ("sums", 3)
