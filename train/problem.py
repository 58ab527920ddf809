"""What a run optimises: a task and named rewards, looked up and tried out before anything starts."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from thornback.contracts import Completion, ConfigError, DataError, Reward, RewardScorer, Task
from thornback.data import RuleScorer, load_task
from thornback.train.config import RunConfig
from thornback.train.settings import Settings


@dataclass
class FunctionReward:
    """A user's function of a `Completion` as a reward. `origin`: where it comes from, for messages."""

    name: str
    function: Callable[[Completion], float | None]
    range: tuple[float, float]
    origin: str

    def __call__(self, completion: Completion) -> float | None:
        return self.function(completion)


@dataclass(frozen=True)
class Problem:
    """A task, the rewards that count, their base weights `[K]` and ranges `[K, 2]`, and what makes a scorer of them.

    `make_scorer` travels to the reward models: it holds names, or what the caller handed over.
    """

    task: Task
    rewards: tuple[Reward, ...]
    weights: np.ndarray
    make_scorer: Callable[[], RewardScorer]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def ranges(self) -> np.ndarray:
        return np.array([reward.range for reward in self.rewards], np.float64)

    @classmethod
    def of(cls, settings: Settings) -> Problem:
        """Look everything up, and score one made-up answer; raises a `ThornbackError` that names what is wrong."""
        config = settings.config
        task = settings.task or load_task(config.task.name, config.task.options)
        rewards = find_rewards(settings, task)
        weights = np.array([config.rewards[r.name].weight if config.rewards else 1.0 for r in rewards])
        if settings.task is None and not settings.functions:
            make_scorer: Callable[[], RewardScorer] = partial(_scorer_of, config)
        else:
            make_scorer = partial(RuleScorer, task, rewards)
        problem = cls(task, rewards, weights / weights.sum(), make_scorer)
        problem.try_out()
        return problem

    def try_out(self) -> None:
        """Judge an answer to the first prompt: a reward that raises, or returns no number, is found here."""
        prompt = next(iter(self.task.prompts("train")), None)
        if prompt is None:
            raise DataError(f"The task {self.task.name} has no training prompts.")
        self.make_scorer().score([Completion(prompt, prompt.answer or "", 1, "stop")])


def find_rewards(settings: Settings, task: Task) -> tuple[Reward, ...]:
    """The configured rewards, in their order; all of the task's if none is configured."""
    chosen = settings.config.rewards
    of_task = {reward.name: reward for reward in task.rewards}
    if not chosen:
        return tuple(task.rewards)
    found: list[Reward] = []
    for name, section in chosen.items():
        function, origin = settings.functions.get(name), f"the reward {name}"
        if function is None and section.function is not None:
            function, origin = import_function(section.function, f"rewards.{name}.function"), section.function
        if function is not None:
            limits: tuple[float, float] = section.range or getattr(function, "range", None) or (0.0, 1.0)
            found.append(FunctionReward(name, function, limits, origin))
        elif name in of_task:
            found.append(of_task[name])
        else:
            nearest = difflib.get_close_matches(name, of_task, n=1, cutoff=0.0)
            hint = f'did you mean "{nearest[0]}"?' if nearest else "it has none of its own."
            raise ConfigError(f'rewards: the task {task.name} has no reward "{name}"; {hint} Or give its function.')
    return tuple(found)


def import_function(path: str, key: str) -> Callable:
    """The object at `package.module:name`; raises `ConfigError` naming the setting `key`."""
    module, colon, name = path.partition(":")
    if not colon or not name:
        raise ConfigError(f'{key} is "{path}", but must be an import path such as package.module:name.')
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: {path} cannot be imported ({error}).") from error
    if not callable(function):
        raise ConfigError(f"{key}: {path} is a {type(function).__name__}, but must be a function.")
    return function


def _scorer_of(config: RunConfig) -> RewardScorer:
    """The scorer of a configuration, made where it is used."""
    task = load_task(config.task.name, config.task.options)
    return RuleScorer(task, find_rewards(Settings(config), task))
