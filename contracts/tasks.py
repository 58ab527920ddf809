"""What a model is trained to do: prompts, and named rewards with their ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem. `key` is unique and stable: seeds, anchors and resume hang on it.

    `messages` is the conversation in the chat format (`{"role": ..., "content": ...}`), without the task's
    system prompt. `answer` is the reference answer, if there is one; `extra` holds the row's other columns.
    """

    key: str
    messages: tuple[Mapping[str, str], ...]
    answer: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of the model to one prompt: what a reward looks at. `num_tokens` counts the model's own tokens."""

    prompt: Prompt
    text: str
    num_tokens: int
    finish_reason: str


class Reward(Protocol):
    """A named judgement of a completion. `range` is (low, high); None or NaN means: does not apply."""

    @property
    def name(self) -> str: ...

    @property
    def range(self) -> tuple[float, float]: ...

    def __call__(self, completion: Completion) -> float | None: ...


class Task(Protocol):
    """Prompts plus judgement. `rewards` come in the order in which they are reported."""

    name: str
    system_prompt: str | None
    rewards: tuple[Reward, ...]

    def prompts(self, split: str) -> Iterator[Prompt]:
        """The prompts of "train" or "test", in a fixed order. Nothing of one is in the other."""

    def is_correct(self, completion: Completion) -> bool:
        """The verdict that difficulty, filtering and the report's accuracy go by."""


class RewardScorer(Protocol):
    """What scores a batch of completions: rules here, a model or a remote judge elsewhere."""

    reward_names: tuple[str, ...]

    def score(self, completions: list[Completion]) -> dict[str, np.ndarray]:
        """Per reward name, float32 `[len(completions)]`, NaN where it does not apply; and "correct" in {0, 1}."""
