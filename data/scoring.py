"""Scores completions with rules, and counts what is no score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from thornback.contracts import BatchReward, Completion, ConfigError, Reward, RewardError, Task


class RuleScorer:
    """The `RewardScorer` of a task's rules. `rewards` None: all of the task's."""

    def __init__(self, task: Task, rewards: Sequence[Reward | BatchReward] | None = None) -> None:
        self.task = task
        self.rewards = tuple(task.rewards if rewards is None else rewards)
        self.reward_names = tuple(reward.name for reward in self.rewards)
        self.failures: dict[str, tuple[int, str]] = {}
        own = {reward.name: reward for reward in task.rewards}
        if any(r.name == "correct" and type(r) is not type(own.get("correct")) for r in self.rewards):
            raise ConfigError(
                "A reward of your own cannot be called correct: that is the task's verdict, which accuracy and "
                "filters go by; choose another name."
            )

    def score(self, completions: list[Completion]) -> dict[str, np.ndarray]:
        """Per reward name, and for "correct", the task's verdict, float32 `[R]`.

        Where a reward raises, or returns no number in its range, the score is NaN, and `failures` counts the cause.
        """
        self.failures = {}
        scores = {reward.name: self._scores(reward, completions) for reward in self.rewards}
        if "correct" in scores:
            return scores
        verdicts = [_tried(self._verdict, completion) for completion in completions]
        return {**scores, "correct": self._checked("correct", (0.0, 1.0), verdicts, completions)}

    def _verdict(self, completion: Completion) -> bool:
        return bool(self.task.is_correct(completion))  # numpy's, for one, is no number

    def _scores(self, reward: Reward | BatchReward, completions: Sequence[Completion]) -> np.ndarray:
        said: Sequence[Any]
        if not isinstance(reward, BatchReward):
            said = [_tried(reward, completion) for completion in completions]
        else:
            said = _tried(reward.score_all, completions) if completions else []
            if isinstance(said, Exception):
                said = [said] * len(completions)
        return self._checked(reward.name, reward.range, said, completions)

    def _checked(
        self, name: str, range: tuple[float, float], said: Sequence[Any], completions: Sequence[Completion]
    ) -> np.ndarray:
        """float32 `[R]`: NaN where nothing is said, or what is said is no score, which is counted."""
        scores = np.full(len(completions), np.nan, np.float32)
        for i, (value, completion) in enumerate(zip(said, completions, strict=True)):
            try:
                scores[i] = _number(value, range)
            except RewardError as error:
                cause = f"The reward {name} {error}"[:300].rstrip(".")
                count, first = self.failures.get(cause, (0, completion.prompt.key))
                self.failures[cause] = (count + 1, first)
        return scores


def _tried(function: Callable[[Any], Any], argument: Any) -> Any:
    """What it returns, or the exception that it raises: a user's function may fail in any way."""
    try:
        return function(argument)
    except Exception as error:
        return error


def _number(value: Any, range: tuple[float, float]) -> float:
    """A score as a number, NaN where there is none. Raises `RewardError` for what is no score."""
    if value is None:
        return math.nan
    if isinstance(value, RewardError):
        raise value
    if isinstance(value, Exception):
        raise RewardError(f"raised {type(value).__name__}: {value}.")
    if not isinstance(value, Real) or isinstance(value, complex):
        raise RewardError(f"returned {value!r}, a {type(value).__name__}; return a number, or None.")
    low, high = range
    number = float(value)
    if not math.isnan(number) and not low - 1e-6 <= number <= high + 1e-6:
        raise RewardError(f"returned {number}, but its range is [{low}, {high}].")
    return number


def check_failures(failures: Mapping[str, tuple[int, str]], num_completions: int, allowed_share: float) -> None:
    """Raise `RewardError`, naming the most frequent cause, where more than this share of completions met one."""
    failed = sum(count for count, _ in failures.values())
    if failed > allowed_share * num_completions:
        cause, (count, first) = max(failures.items(), key=lambda item: item[1][0])
        raise RewardError(
            f"{cause}: {count} of {num_completions} times, first on prompt {first}; mend it, or allow some with "
            "scoring.max_failed_share."
        )
