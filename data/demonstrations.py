"""Imperfect worked answers for the warm start of the arithmetic task: right enough to learn from, with room left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from thornback.contracts import Message, Prompt
from thornback.data.tasks.arithmetic import ArithmeticTask, Problem

_FILLERS = ("well, ", "ok so ", "hm, ", "let me see, ")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the text that answers it; or `turns`, where an environment's messages stand between the model's."""

    prompt: Prompt
    completion: str = ""
    turns: tuple[str | tuple[Message, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaws:
    """How often demonstrations are spoiled, each chance by itself: a wrong column, an answer without reasoning (half
    of these wrong), words around the columns, a tag that is missing."""

    wrong_column: float = 0.10
    direct: float = 0.15
    wordy: float = 0.40
    broken_tags: float = 0.15


def make_demonstrations(
    task: ArithmeticTask, count: int, seed: int = 0, flaws: Flaws | None = None
) -> list[Demonstration]:
    """`count` demonstrations of training problems, which come up again with other flaws once all have been used."""
    rng = np.random.default_rng([seed, 7])
    pairs = list(zip(task.problems("train"), task.prompts("train"), strict=True))
    flaws = flaws or Flaws()
    return [
        Demonstration(prompt, _answer(problem, flaws, rng))
        for (problem, _), prompt in (pairs[i] for i in rng.integers(len(pairs), size=count))
    ]


def _answer(problem: Problem, flaws: Flaws, rng: np.random.Generator) -> str:
    if rng.random() < flaws.direct:
        wrong = int(rng.random() < 0.5) * int(rng.integers(1, 10))
        return f"<answer>{problem.answer + wrong}</answer>"
    columns = problem.columns()
    answer = problem.answer
    if rng.random() < flaws.wrong_column:
        columns, answer = _with_a_wrong_column(columns, rng)
    thoughts = ",".join(columns)
    if rng.random() < flaws.wordy:
        thoughts = _FILLERS[rng.integers(len(_FILLERS))] + " then ".join(columns) + " done"
    text = f"<think>{thoughts}</think><answer>{answer}</answer>"
    if rng.random() < flaws.broken_tags:
        tags = ("<think>", "</think>", "<answer>", "</answer>")
        text = text.replace(tags[rng.integers(len(tags))], "")
    return text


def _with_a_wrong_column(columns: list[str], rng: np.random.Generator) -> tuple[list[str], int]:
    """One column's result is off by a little, and the answer is read off the results as they stand."""
    at = int(rng.integers(len(columns)))
    left, _, result = columns[at].partition("=")
    wrong = max(0, int(result) + int(rng.choice([-2, -1, 1, 2])))
    columns = [*columns[:at], f"{left}={wrong}", *columns[at + 1 :]]
    results = [c.partition("=")[2] for c in columns]
    return columns, int("".join([results[-1], *[r[-1] for r in reversed(results[:-1])]]))
