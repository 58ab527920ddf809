"""The built-in rewards, and what makes a reward of a user's function. Each has a name, a range, and one idea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thornback.contracts import Completion, ConfigError
from thornback.data.tags import ANSWER, THINK, is_well_formed

UNIT = (0.0, 1.0)


@dataclass
class Correct:
    """1 where the task's verdict is that the answer is right, else 0."""

    judge: Callable[[Completion], bool]
    name: str = "correct"
    range: tuple[float, float] = UNIT

    def __call__(self, completion: Completion) -> float:
        return float(self.judge(completion))


@dataclass
class Format:
    """1 where reasoning and answer stand in the asked tags, exactly once and in order, with nothing around them."""

    think: str = THINK
    answer: str = ANSWER
    name: str = "format"
    range: tuple[float, float] = UNIT

    def __call__(self, completion: Completion) -> float:
        return float(is_well_formed(completion.text, self.think, self.answer))


@dataclass
class Brevity:
    """1 where the answer takes at most `budget` tokens, else 0: the length reward of DVAO (arXiv 2605.25604).

    `slack` above 0 (ours) lets it fall in a straight line from 1 at `budget` to 0 at `budget + slack` tokens, so
    that answers a little too long are told from those that never end.
    """

    budget: int
    slack: int = 0
    name: str = "brevity"
    range: tuple[float, float] = UNIT

    def __post_init__(self) -> None:
        if self.budget < 1 or self.slack < 0:
            raise ConfigError(f"brevity: a budget of {self.budget} and a slack of {self.slack} tokens make no sense.")

    def __call__(self, completion: Completion) -> float:
        over = completion.num_tokens - self.budget
        if over <= 0:
            return 1.0
        return max(0.0, 1.0 - over / self.slack) if self.slack else 0.0


@dataclass
class FunctionReward:
    """A user's function of a `Completion`, under a name. It returns a number within `range`, or None where it does
    not apply."""

    name: str
    function: Callable[[Completion], float | None]
    range: tuple[float, float] = UNIT

    def __call__(self, completion: Completion) -> float | None:
        return self.function(completion)
