"""The task of the training benchmark: short chats, and two rewards that cost next to nothing to compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from thornback.contracts import Completion, Prompt, Reward

NUM_PROMPTS = 1024


def digits(text: str) -> float:
    """The share of characters that are digits."""
    return sum(map(str.isdigit, text)) / max(len(text), 1)


def variety(text: str) -> float:
    """Distinct characters among the first hundred."""
    return len(set(text[:100])) / 100


def questions() -> list[str]:
    """The same for every peer, in this order, all of one length in tokens."""
    rng = random.Random(0)
    return [f"What is {rng.randrange(100, 1000)} + {rng.randrange(100, 1000)}?" for _ in range(NUM_PROMPTS)]


@dataclass(frozen=True)
class TextReward:
    """A function of a completion's text as a reward."""

    name: str
    function: Callable[[str], float]
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        return self.function(completion.text)


class Problems:
    """The benchmark's `Task`."""

    name = "problems"
    system_prompt: str | None = None
    rewards: tuple[Reward, ...] = (TextReward("digits", digits), TextReward("variety", variety))

    def prompts(self, split: str) -> Iterator[Prompt]:
        for number, question in enumerate(questions()):
            yield Prompt(f"{split}-{number}", ({"role": "user", "content": question},))

    def is_correct(self, completion: Completion) -> bool:
        return False
