"""Rewards by rule: is the answer right, are the tags as asked, is it short enough; and a user's own functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thornback.contracts import BatchReward, Completion, ConfigError, Reward
from thornback.data.importing import load_object

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_WELL_FORMED = re.compile(r"\s*<think>(?P<think>.+?)</think>\s*<answer>(?P<answer>.+?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def tagged_answer(text: str) -> str | None:
    """What stands in the answer tags; None where there is not exactly one such pair."""
    found = _ANSWER.findall(text)
    return found[0].strip() if len(found) == 1 else None


@dataclass(frozen=True)
class Correct:
    """1 where `is_correct` says so, else 0."""

    is_correct: Callable[[Completion], bool]
    name: str = "correct"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        return float(self.is_correct(completion))


@dataclass(frozen=True)
class TagFormat:
    """1 for `<think>reasoning</think><answer>answer</answer>`, each once, neither empty, nothing outside; else 0."""

    name: str = "format"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        whole = _WELL_FORMED.fullmatch(completion.text)
        return float(bool(whole) and len(_TAG.findall(completion.text)) == 4)


@dataclass(frozen=True)
class BoxedFormat:
    """1 where there is exactly one \\boxed{...}, as mathematics prompts ask; else 0."""

    name: str = "format"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        return float(completion.text.count("\\boxed{") == 1)


@dataclass(frozen=True)
class Brevity:
    """1 for at most `budget` tokens, else 0 (the length reward of arXiv 2605.25604). With `margin` (ours) it falls
    linearly from 1 at the budget to 0 at `budget + margin` tokens."""

    budget: int
    margin: int = 0
    name: str = "brevity"
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float:
        over = completion.num_tokens - self.budget
        if over <= 0:
            return 1.0
        return max(0.0, 1.0 - over / self.margin) if self.margin else 0.0


@dataclass(frozen=True)
class FunctionReward:
    """A plain function of a `Completion` as a reward."""

    name: str
    function: Callable[[Completion], float | None] = field(repr=False)
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float | None:
        return self.function(completion)


@dataclass(frozen=True)
class ManyReward:
    """An object with a method `score_all` as a reward."""

    name: str
    thing: Any = field(repr=False)
    range: tuple[float, float] = (0.0, 1.0)

    def score_all(self, completions: Sequence[Completion]) -> Sequence[float | Exception | None]:
        return self.thing.score_all(completions)

    def check(self) -> bool:
        """Let the thing check itself; False: it does not know how."""
        if not hasattr(self.thing, "check"):
            return False
        self.thing.check()
        return True


def as_reward(
    name: str, thing: Any, range: tuple[float, float] | None = None, options: Mapping[str, Any] | None = None
) -> Reward | BatchReward:
    """A reward of this name from a function of a `Completion`, an object with a `range`, one with a method `score_all`,
    a class of such objects, which gets `options`, or the import path of one of these. `range` None: the thing's own, or
    [0, 1]."""
    if isinstance(thing, str):
        thing = load_object(thing)
    if isinstance(thing, type):
        try:
            thing = thing(**(options or {}))
        except TypeError as error:
            raise ConfigError(f"The reward {name} cannot be made with its options: {error}.") from error
    elif options:
        raise ConfigError(f"The reward {name} is no class, which alone could take options.")
    many = hasattr(thing, "score_all")
    if not many and not callable(thing):
        raise ConfigError(f"The reward {name} is a {type(thing).__name__}; give a function of a Completion.")
    low, high = range if range is not None else getattr(thing, "range", (0.0, 1.0))
    if not low < high:
        raise ConfigError(f"The reward {name} ranges from {low} to {high}; the first must be the smaller.")
    return (ManyReward if many else FunctionReward)(name, thing, (float(low), float(high)))


def pick_rewards(available: Iterable[Reward | BatchReward], names: Iterable[str]) -> tuple[Reward | BatchReward, ...]:
    """A task's rewards by name. Raises `ConfigError` for a name that the task does not have."""
    by_name = {reward.name: reward for reward in available}
    for name in names:
        if name not in by_name:
            known = ", ".join(by_name) or "none"
            raise ConfigError(f"There is no reward {name}: the task has {known}; give your own with `function:`.")
    return tuple(by_name[name] for name in names)
