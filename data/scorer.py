"""Judging completions by rules: which rewards a run has, and what they may return."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from thornback.contracts import Completion, ConfigError, Reward, RewardError, Task
from thornback.data.imports import load_object
from thornback.data.rewards import UNIT, FunctionReward

VERDICT = "correct"  # the key of the task's verdict among the scores
RewardSource = str | Callable[[Completion], float | None] | None


def select_rewards(
    task: Task,
    sources: Mapping[str, RewardSource] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[Reward, ...]:
    """The rewards of a run, in the order of `sources`; all of the task's if that is empty.

    A source is the import path of a function (or of a class, which is called without arguments), a function, or
    None for the task's reward of this name. `ranges` has precedence over a reward's own `range` attribute, and
    [0, 1] is the default. Raises `ConfigError` for a name that the task does not have, or no function.
    """
    ranges = ranges or {}
    known = {reward.name: reward for reward in task.rewards}
    names: Mapping[str, RewardSource] = sources or dict.fromkeys(known)
    return tuple(_reward(task, name, source, known.get(name), ranges.get(name)) for name, source in names.items())


def _reward(
    task: Task, name: str, source: RewardSource, known: Reward | None, limits: tuple[float, float] | None
) -> Reward:
    if source is None:
        if known is None:
            raise ConfigError(
                f'rewards: the task "{task.name}" has no reward "{name}", only '
                f"{', '.join(r.name for r in task.rewards) or 'none'}; for one of your own give "
                f"rewards.{name}.function."
            )
        if limits is None or tuple(limits) == tuple(known.range):
            return known
        return FunctionReward(name, known, _checked_range(name, limits))
    if name == VERDICT:
        raise ConfigError(
            f'rewards: "{VERDICT}" is the task\'s own verdict, which accuracy goes by; call {source} something else.'
        )
    function: Any = load_object(source, f"reward {name}") if isinstance(source, str) else source
    if isinstance(function, type):
        function = function()
    if not callable(function):
        raise ConfigError(f"rewards.{name}: {source} is a {type(function).__name__}, not a function of a Completion.")
    return FunctionReward(name, function, _checked_range(name, limits or getattr(function, "range", UNIT)))


def _checked_range(name: str, limits: Any) -> tuple[float, float]:
    try:
        low, high = (float(x) for x in limits)
    except (TypeError, ValueError):
        raise ConfigError(f"rewards.{name}: its range is {limits!r}; give the lowest and the highest value.") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"rewards.{name}: its range is [{low:g}, {high:g}]; the first must be below the second.")
    return low, high


class RuleScorer:
    """Scores completions with the rewards of a task, or those given; implements `contracts.RewardScorer`."""

    def __init__(self, task: Task, rewards: Sequence[Reward] | None = None) -> None:
        self.task = task
        self.rewards = tuple(task.rewards if rewards is None else rewards)
        self.reward_names = tuple(reward.name for reward in self.rewards)

    def score(self, completions: list[Completion]) -> dict[str, np.ndarray]:
        """Per reward name float32 `[len(completions)]`, NaN where it does not apply, as the reward gave it; and the
        task's verdict under "correct", in {0, 1}.

        Raises `RewardError`, naming reward and prompt, for a reward that raises, or returns anything but None and a
        number within its range.
        """
        scores = {
            reward.name: np.array([_value(reward, c) for c in completions], np.float32) for reward in self.rewards
        }
        return scores | {VERDICT: np.array([self._verdict(c) for c in completions], np.float32)}

    def _verdict(self, completion: Completion) -> bool:
        try:
            return bool(self.task.is_correct(completion))
        except Exception as error:
            raise RewardError(
                f'The verdict of the task "{self.task.name}" raised {type(error).__name__}: {error} '
                f"on an answer to the prompt {completion.prompt.key}."
            ) from error


def _value(reward: Reward, completion: Completion) -> float:
    where = f'The reward "{reward.name}"{_origin(reward)}'
    prompt = f"for an answer to the prompt {completion.prompt.key}"
    try:
        value: Any = reward(completion)
    except Exception as error:
        raise RewardError(f"{where} raised {type(error).__name__}: {error} {prompt}; correct the function.") from error
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if value is None:
        return math.nan
    if not isinstance(value, numbers.Real | np.bool_):
        raise RewardError(f"{where} returned {value!r} {prompt}; it must return a number, or None: does not apply.")
    number = float(value)
    low, high = reward.range
    if math.isnan(number):
        return number
    if not low <= number <= high:
        raise RewardError(
            f"{where} returned {number:g} {prompt}, outside its range [{low:g}, {high:g}]; give it another range."
        )
    return number


def _origin(reward: Reward) -> str:
    if not isinstance(reward, FunctionReward):
        return ""
    function = cast(Any, reward.function)
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f" ({module}:{name})" if module else f" ({name})"
