"""What a run optimises: a task and named rewards, looked up and tried out before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from thornback.actors import EpisodeSpec
from thornback.contracts import BatchReward, Completion, DataError, InteractiveTask, Reward, RewardScorer, Task
from thornback.data import ManyReward, RuleScorer, as_reward, check_failures, load_task, pick_rewards
from thornback.train.config import RunConfig
from thornback.train.settings import Settings


@dataclass(frozen=True)
class Problem:
    """A task, the rewards that count, their base weights `[K]`, and what makes a scorer of them.

    `make_scorer` travels to the reward models, and `episodes` (None: an answer is one turn) to the rollout workers:
    they hold names, or what the caller handed over.
    """

    task: Task
    rewards: tuple[Reward | BatchReward, ...]
    weights: np.ndarray
    make_scorer: Callable[[], RewardScorer]
    episodes: EpisodeSpec | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.rewards)

    @property
    def ranges(self) -> np.ndarray:
        """`[K, 2]`: the lowest and the highest value of each reward."""
        return np.array([reward.range for reward in self.rewards], np.float64)

    @classmethod
    def of(cls, settings: Settings) -> Problem:
        """Look everything up, and score one made-up answer; raises a `ThornbackError` that names what is wrong."""
        config = settings.config
        task = settings.task or load_task(config.task.name, config.task.options)
        rewards = _rewards(settings, task)
        weights = np.array([config.rewards[r.name].weight if config.rewards else 1.0 for r in rewards])
        by_name = settings.task is None and not settings.functions
        make_scorer = partial(_scorer_of, config) if by_name else partial(RuleScorer, task, rewards)
        problem = cls(task, rewards, weights / weights.sum(), make_scorer, _episodes(settings, task))
        problem.try_out()
        return problem

    def try_out(self) -> None:
        """Judge an answer to the first prompt: a reward that raises, or returns no number, is found here. What is too
        heavy for that checks itself."""
        prompt = next(iter(self.task.prompts("train")), None)
        if prompt is None:
            raise DataError(f"The task {self.task.name} has no training prompts.")
        light = [r for r in self.rewards if not (isinstance(r, ManyReward) and r.check())]
        scorer = RuleScorer(self.task, light)
        scorer.score([Completion(prompt, prompt.answer or "", 1, "stop")])
        check_failures(scorer.failures, 1, 0.0)


def _rewards(settings: Settings, task: Task) -> tuple[Reward | BatchReward, ...]:
    """The configured rewards, in their order; the task's own if none is configured."""
    if not settings.config.rewards:
        return tuple(task.rewards)
    available = (*task.rewards, *getattr(task, "more_rewards", ()))
    found: list[Reward | BatchReward] = []
    for name, section in settings.config.rewards.items():
        own = settings.functions.get(name) or section.function
        if own is not None:
            found.append(as_reward(name, own, section.range, section.options))
            continue
        (reward,) = pick_rewards(available, [name])
        plain = section.range is None and not section.options
        found.append(reward if plain else as_reward(name, reward, section.range, section.options))
    return tuple(found)


def _episodes(settings: Settings, task: Task) -> EpisodeSpec | None:
    """With whom the task's answers take turns."""
    if not isinstance(task, InteractiveTask):
        return None
    config, limits = settings.config.task, settings.config.environment
    make_task = (
        partial(load_task, config.name, config.options) if settings.task is None else partial(_handed_over, task)
    )
    return EpisodeSpec(make_task, limits.max_turns, limits.timeout_seconds)  # type: ignore[arg-type]


def _handed_over(task: Task) -> Task:
    return task


def _scorer_of(config: RunConfig) -> RewardScorer:
    """The scorer of a configuration, made where it is used: a task's data need not travel."""
    task = load_task(config.task.name, config.task.options)
    return RuleScorer(task, _rewards(Settings(config), task))
