"""Arithmetic with a working and an answer: the demo's task, made from nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from thornback.contracts import Completion, ConfigError, Prompt, Reward
from thornback.data.rewards import Brevity, Correct, Format
from thornback.data.tags import tagged
from thornback.data.tasks.problems import SPLITS, Difficulty, Problem, distinct_problems


class ArithmeticTask:
    """Word and symbol problems, such as "47 + 38" and "What is 265 plus 117?".

    `digits`: how many the operands have, one number or (lowest, highest). `operators`: some of "+", "-", "*".
    `word_share`: share of word problems. `seed`: another seed, other problems. `num_train` and `num_test`: how
    many of each. `held_out`: the share of all problems that only the test split may show; it goes by a hash of the
    problem, so the two are disjoint whatever else is set. `budget` and `brevity_slack`: tokens of a brief answer.
    `system_prompt`: none by default, since the demo's models learn the format from demonstrations.
    """

    name = "arithmetic"

    def __init__(
        self,
        *,
        digits: int | Sequence[int] = (2, 3),
        operators: Sequence[str] = ("+", "-"),
        word_share: float = 0.25,
        seed: int = 0,
        num_train: int = 4096,
        num_test: int = 1024,
        held_out: float = 0.125,
        budget: int = 32,
        brevity_slack: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        lowest, highest = (digits, digits) if isinstance(digits, int) else digits
        if not 0.0 < held_out < 1.0:
            raise ConfigError(f"arithmetic: held_out is {held_out}; give a share between 0 and 1.")
        self.difficulty = Difficulty((lowest, highest), tuple(operators), word_share)
        self.seed = seed
        self.counts = {"train": num_train, "test": num_test}
        self.held_out = held_out
        self.system_prompt = system_prompt
        self.rewards: tuple[Reward, ...] = (Correct(self.is_correct), Format(), Brevity(budget, brevity_slack))

    def prompts(self, split: str) -> Iterator[Prompt]:
        """The problems of a split: the same for the same options, none of them twice."""
        if split not in SPLITS:
            raise ConfigError(f'arithmetic has no split "{split}", only {" and ".join(SPLITS)}.')
        for problem in distinct_problems(self.difficulty, split, self.held_out, self.seed, self.counts[split]):
            yield prompt_of(problem)

    def is_correct(self, completion: Completion) -> bool:
        """Whether the number in the last answer tags is the result; spaces around it and leading zeros are allowed."""
        answer = tagged(completion.text)
        if answer is None or not answer.removeprefix("-").isdecimal() or not answer.isascii():
            return False
        return int(answer) == int(completion.prompt.answer or "")


def prompt_of(problem: Problem) -> Prompt:
    """The problem as a prompt."""
    extra: dict[str, Any] = {"operator": problem.operator, "is_word_problem": problem.form > 0}
    return Prompt(f"arithmetic/{problem.key}", ({"role": "user", "content": problem.text},), str(problem.answer), extra)
