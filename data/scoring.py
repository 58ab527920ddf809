"""Scores completions with rules, and refuses what is no score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np

from thornback.contracts import Completion, ConfigError, Reward, RewardError, Task


class RuleScorer:
    """The `RewardScorer` of a task's rules. `rewards` None: all of the task's."""

    def __init__(self, task: Task, rewards: Sequence[Reward] | None = None) -> None:
        self.task = task
        self.rewards = tuple(task.rewards if rewards is None else rewards)
        self.reward_names = tuple(reward.name for reward in self.rewards)
        own = {reward.name: reward for reward in task.rewards}
        if any(r.name == "correct" and type(r) is not type(own.get("correct")) for r in self.rewards):
            raise ConfigError(
                "A reward of your own cannot be called correct: that is the task's verdict, which accuracy and "
                "filters go by; choose another name."
            )

    def score(self, completions: list[Completion]) -> dict[str, np.ndarray]:
        """Per reward name, and for "correct", the task's verdict, float32 `[R]`.

        Raises `RewardError`, naming reward, prompt and value, where a reward raises or returns no number in its
        range.
        """
        scores = {
            reward.name: np.array([checked_score(reward, c) for c in completions], np.float32)
            for reward in self.rewards
        }
        verdicts = np.array([self.task.is_correct(c) for c in completions], np.float32)
        return {**scores, "correct": verdicts} if "correct" not in scores else scores


def checked_score(reward: Reward, completion: Completion) -> float:
    """The reward of one completion, NaN where it does not apply."""
    where = f"The reward {reward.name}, on prompt {completion.prompt.key},"
    try:
        value = reward(completion)
    except RewardError:
        raise
    except Exception as error:  # a user's function may fail in any way
        raise RewardError(f"{where} raised {type(error).__name__}: {error}.") from error
    if value is None:
        return math.nan
    if not isinstance(value, Real) or isinstance(value, complex):
        raise RewardError(f"{where} returned {value!r}, a {type(value).__name__}; return a number, or None.")
    low, high = reward.range
    number = float(value)
    if not math.isnan(number) and not low - 1e-6 <= number <= high + 1e-6:
        raise RewardError(f"{where} returned {number}, but its range is [{low}, {high}].")
    return number
