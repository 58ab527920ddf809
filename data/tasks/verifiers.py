"""Environments of the `verifiers` library (verifiers.v1, 0.4), as they are."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import ModuleType
from typing import TYPE_CHECKING, Any

from thornback.contracts import Completion, ConfigError, DataError, Prompt
from thornback.data.tasks.drawing import is_held_out

if TYPE_CHECKING:
    import verifiers.v1 as vf

    from thornback.data.tasks.verifiers_episode import Serving, VerifiersEnvironment


@dataclass(frozen=True)
class Judged:
    """What the environment has judged by this name; it does not apply where that is nothing."""

    name: str
    range: tuple[float, float] = (0.0, 1.0)

    def __call__(self, completion: Completion) -> float | None:
        return completion.judged.get(self.name)


class VerifiersTask:
    """The tasks of an installed environment, played and judged by the library.

    `env` is the library's own `env` section of a run, or just the name of a taskset; `select` says which of its tasks,
    as the library's section of that name does. Held out is a share of them, chosen by the hash of their prompts; or,
    with `test_taskset`, what these settings over those of the taskset make of it. An episode is correct where its
    reward is at least `solved`. The reward is `reward`, the library's total; a recipe may name the rewards and metrics
    behind it instead.
    """

    name = "verifiers"
    system_prompt = None  # each task brings its own

    def __init__(
        self,
        env: str | Mapping[str, Any],
        test_taskset: Mapping[str, Any] | None = None,
        select: Mapping[str, Any] | None = None,
        held_out_share: float = 0.1,
        max_turns: int = 16,
        solved: float = 1.0,
    ) -> None:
        if not (0 < held_out_share < 1 and max_turns >= 1):
            raise ConfigError("The task verifiers wants held_out_share in (0, 1) and max_turns of 1 or more.")
        section = {"taskset": {"id": env}} if isinstance(env, str) else dict(env)
        sections = {"train": section}
        if test_taskset is not None:
            sections["test"] = {**section, "taskset": {**section.get("taskset", {}), **test_taskset}}
        playable = _library().playable
        self._configs = {split: playable(section, select or {}) for split, section in sections.items()}
        self.held_out_share = held_out_share
        self.max_turns = max_turns
        self.solved = solved
        self.rewards = (Judged("reward"),)
        self._loaded: dict[str, dict[str, vf.Task]] = {}
        self._servings: dict[asyncio.AbstractEventLoop, Serving] = {}

    def prompts(self, split: str) -> Iterator[Prompt]:
        """Raises `ConfigError` for a task that cannot be played, and `DataError` where they cannot be loaded."""
        if split not in ("train", "test"):
            raise ConfigError(f'The task verifiers has the splits train and test, not "{split}".')
        return (_library().prompt_of(task, self._tools) for task in self._tasks(split).values())

    def environment(self, prompt: Prompt, seed: int) -> VerifiersEnvironment:
        """What is random in it is the library's: it takes no seed."""
        from thornback.data.tasks.verifiers_episode import VerifiersEnvironment

        task = self._tasks("train").get(prompt.key) or self._tasks("test").get(prompt.key)
        if task is None:
            raise ConfigError("The taskset loads other tasks each time; its load() must give the same in each process.")
        return VerifiersEnvironment(task, prompt, self._serving)

    def is_correct(self, completion: Completion) -> bool:
        return completion.judged.get("reward", 0.0) >= self.solved - 1e-6  # judgements travel as float32

    @property
    def more_rewards(self) -> tuple[Judged, ...]:
        """What the total is made of, and the metrics, as far as their names are known before an episode."""
        return tuple(Judged(name) for task in self._some_task for name in _library().judgements(task))

    @property
    def _some_task(self) -> list[vf.Task]:
        """One, or none if there is none: an environment's tasks share their kind."""
        return list(islice(self._tasks("train").values(), 1))

    @cached_property
    def _tools(self) -> tuple[Mapping[str, Any], ...]:
        config, _ = self._configs["train"]
        return tuple(tool for task in self._some_task for tool in _library().offered_tools(config, task))

    def _tasks(self, split: str) -> dict[str, vf.Task]:
        """The tasks of a split by their keys."""
        if split not in self._loaded:
            config, select = self._configs.get(split, self._configs["train"])
            try:
                tasks = list(_library().tasks_of(config, select))
            except Exception as error:  # an environment is somebody's own code
                raise DataError(f"The tasks of {config.env_id} cannot be loaded: {error}") from error
            if "test" not in self._configs:
                share, held_out = self.held_out_share, split == "test"
                tasks = [task for task in tasks if is_held_out(task.data.prompt_text, share) == held_out]
            self._loaded[split] = {task.key: task for task in tasks}
        return self._loaded[split]

    def _serving(self) -> Serving:
        from thornback.data.tasks.verifiers_episode import Serving

        config, _ = self._configs["train"]
        return self._servings.setdefault(asyncio.get_running_loop(), Serving(config))


def _library() -> ModuleType:
    """What knows the library, which takes seconds to import and need not be there."""
    try:
        return importlib.import_module("thornback.data.tasks.verifiers_env")
    except ImportError as error:
        raise ConfigError(
            f"The task verifiers needs the library of that name: pip install 'thornback[verifiers]' ({error})."
        ) from error
