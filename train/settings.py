"""From what a Python caller hands over to a configuration, and the objects that a file cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thornback.contracts import ConfigError, Task
from thornback.train.config import RunConfig, load_recipe, make_config


@dataclass(frozen=True)
class Settings:
    """A configuration, and what only lives in the caller's process: a task, and reward functions by name."""

    config: RunConfig
    task: Task | None = None
    functions: Mapping[str, Callable] = field(default_factory=dict)


def settings_of(
    config: RunConfig | Mapping[str, Any] | str | Path | None, model: Any, data: Any, reward: Any
) -> Settings:
    """What `Trainer(...)` was given. `model`, `data` and `reward` go over the configuration's own."""
    if isinstance(config, str | Path):
        config = load_recipe(config)
    values = dict(config.model_dump() if isinstance(config, RunConfig) else config or {})
    if model is not None:
        values["model"] = {**(values.get("model") or {}), "path": str(model), "build": None}
    task, task_section = _task_of(data)
    if task_section is not None:
        values["task"] = task_section
    functions = _functions_of(reward)
    if functions:
        values["rewards"] = {name: (values.get("rewards") or {}).get(name, {}) for name in functions}
    return Settings(make_config(values, source="Trainer"), task, functions)


def _task_of(data: Any) -> tuple[Task | None, dict[str, Any] | None]:
    """A task object, or the section that names one."""
    if data is None:
        return None, None
    if isinstance(data, str | Path):
        return None, {"name": "math", "options": {"path": str(data)}}
    if hasattr(data, "prompts") and hasattr(data, "is_correct"):
        return data, {"name": getattr(data, "name", type(data).__name__), "options": {}}
    raise ConfigError(
        f"Trainer: data is a {type(data).__name__}, but must be the path of a dataset or a task "
        "(thornback.contracts.Task)."
    )


def _functions_of(reward: Any) -> dict[str, Callable]:
    """Reward functions by name."""
    if reward is None:
        return {}
    if isinstance(reward, Mapping):
        found = dict(reward)
    else:
        functions = reward if isinstance(reward, list | tuple) else [reward]
        found = {getattr(f, "name", getattr(f, "__name__", f"reward_{i}")): f for i, f in enumerate(functions)}
    for name, function in found.items():
        if not callable(function) and not hasattr(function, "score_all"):
            raise ConfigError(f"Trainer: the reward {name} is a {type(function).__name__}, but must be a function.")
    return found
