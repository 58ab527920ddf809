"""Sums and differences, as symbols or as stories, in any number of digits: what a tiny model can learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from thornback.contracts import Completion, ConfigError, Prompt, Reward
from thornback.data.rewards import Brevity, Correct, TagFormat, tagged_answer
from thornback.data.tasks.drawing import distinct, is_held_out

if TYPE_CHECKING:
    from thornback.data.demonstrations import Demonstration

_STORIES = {
    "+": ("Ann has {a} nuts and finds {b} more. How many now?", "{a} birds sit, {b} come. How many birds?"),
    "-": ("Bob has {a} nuts and eats {b}. How many are left?", "{a} birds sit, {b} leave. How many stay?"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """`a op b`, with op + or -; a difference is never negative."""

    a: int
    op: str
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def canonical(self) -> str:
        """The same for 3+4 and 4+3, so that neither can be trained while the other is held out."""
        a, b = sorted((self.a, self.b)) if self.op == "+" else (self.a, self.b)
        return f"{a}{self.op}{b}"

    def columns(self) -> list[str]:
        """Written arithmetic from the right: 47+38 is 7+8=15, then 4+3+1=8."""
        steps: list[str] = []
        carry = 0
        a, b = self.a, self.b
        while a or b or not steps:
            x, y = a % 10, b % 10
            if self.op == "+":
                total = x + y + carry
                steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
                carry = total // 10
            else:
                borrow = int(x - carry < y)
                steps.append(f"{x + 10 * borrow}-{y}{'-1' if carry else ''}={x + 10 * borrow - y - carry}")
                carry = borrow
            a, b = a // 10, b // 10
        return steps


class ArithmeticTask:
    """Problems of `min_digits` to `max_digits` digits under `operators` ("+", "-" or "+-"), a share of them stories.

    `num_train` and `num_test` problems are drawn from `seed`. A problem is held out if the hash of its canonical
    form says so, with a chance of `held_out_share`: no problem of one split is in the other, whatever the seed.
    Rewards: `correct`, `format` (think and answer tags) and `brevity` (at most `budget` tokens; see Brevity).
    """

    name = "arithmetic"

    def __init__(
        self,
        min_digits: int = 2,
        max_digits: int = 2,
        operators: str = "+",
        story_share: float = 0.0,
        num_train: int = 2048,
        num_test: int = 512,
        held_out_share: float = 0.2,
        budget: int = 32,
        margin: int = 0,
        seed: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        if not 1 <= min_digits <= max_digits or set(operators) - {"+", "-"} or not operators:
            raise ConfigError("The task arithmetic wants 1 <= min_digits <= max_digits and operators of + and -.")
        if not (0 <= story_share <= 1 and 0 < held_out_share < 1):
            raise ConfigError("The task arithmetic wants story_share in [0, 1] and held_out_share in (0, 1).")
        self.digits = (min_digits, max_digits)
        self.operators = operators
        self.story_share = story_share
        self.sizes = {"train": num_train, "test": num_test}
        self.held_out_share = held_out_share
        self.seed = seed
        self.system_prompt = system_prompt
        self.rewards: tuple[Reward, ...] = (Correct(self.is_correct), TagFormat(), Brevity(budget, margin))

    def prompts(self, split: str) -> Iterator[Prompt]:
        if split not in self.sizes:
            raise ConfigError(f'The task arithmetic has the splits train and test, not "{split}".')
        return (self._prompt(problem, story) for problem, story in self.problems(split))

    def problems(self, split: str) -> Iterator[tuple[Problem, str | None]]:
        """The split's problems, each once, with the story that tells it (None: symbols)."""
        rng = np.random.default_rng([self.seed, split == "test"])
        drawn = (self._draw(rng) for _ in count())
        ours = (draw if self.is_held_out(draw[0]) == (split == "test") else None for draw in drawn)

        def refuse(found: int) -> ConfigError:
            return ConfigError(
                f"The task arithmetic has only about {found} {split} problems of {self.digits[0]} to "
                f"{self.digits[1]} digits, but {self.sizes[split]} were asked for; allow more digits."
            )

        return distinct(ours, self.sizes[split], lambda draw: f"{draw[0].canonical}{draw[1]}", refuse)

    def demonstrations(self, count: int, seed: int = 0, **flaws: float) -> list[Demonstration]:
        """Imperfect worked answers to training problems; `flaws` are fields of `Flaws`."""
        from thornback.data.demonstrations import Flaws, make_demonstrations

        try:
            return make_demonstrations(self, count, seed, Flaws(**flaws))
        except TypeError as error:
            raise ConfigError(f"The demonstrations of the task arithmetic: {error}.") from None

    def is_held_out(self, problem: Problem) -> bool:
        return is_held_out(problem.canonical, self.held_out_share)

    def is_correct(self, completion: Completion) -> bool:
        return tagged_answer(completion.text) == completion.prompt.answer

    def _draw(self, rng: np.random.Generator) -> tuple[Problem, str | None]:
        low, high = self.digits
        a, b = (int(rng.integers(10 ** (d - 1) if d > 1 else 0, 10**d)) for d in rng.integers(low, high + 1, size=2))
        op = self.operators[rng.integers(len(self.operators))]
        problem = Problem(max(a, b), op, min(a, b)) if op == "-" else Problem(a, op, b)
        stories = _STORIES[op]
        return problem, stories[rng.integers(len(stories))] if rng.random() < self.story_share else None

    def _prompt(self, problem: Problem, story: str | None) -> Prompt:
        symbols = f"{problem.a}{problem.op}{problem.b}"
        content = story.format(a=problem.a, b=problem.b) if story else f"{symbols}=?"
        key = symbols if story is None else f"{symbols}/{_STORIES[problem.op].index(story)}"
        return Prompt(key, ({"role": "user", "content": content},), str(problem.answer))
