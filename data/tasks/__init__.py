"""What a model is trained to do. `load_task` finds a task by its name, or a user's own by its import path."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from thornback.contracts import ConfigError, Task
from thornback.data.imports import load_object

TASKS = {
    "arithmetic": "thornback.data.tasks.arithmetic:ArithmeticTask",
    "math": "thornback.data.tasks.math:MathTask",
}
_PARTS = ("name", "system_prompt", "rewards", "prompts", "is_correct")


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The built-in task of this name, or whatever `package.module:name` makes of `options`, its keyword arguments.

    Raises `ConfigError` for a name that there is not, options that it does not take, or a thing that is no task.
    """
    if ":" not in name and name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f'task.name: there is no task "{name}"; did you mean "{nearest}"? For one of your own, write '
            "package.module:name."
        )
    maker = load_object(TASKS.get(name, name), "task")
    options = dict(options or {})
    if not callable(maker):
        task, maker = maker, None
        if options:
            raise ConfigError(f"task.options: {name} is a task already and takes no options; name its class.")
    else:
        check_options(maker, options, "task.options")
        task = maker(**options)
    missing = [part for part in _PARTS if not hasattr(task, part)]
    if missing:
        raise ConfigError(
            f"task.name: {name} is no task: it lacks {', '.join(missing)} (see thornback.contracts.Task)."
        )
    return task


def check_options(function: Any, options: Mapping[str, Any], where: str, skip: int = 0) -> None:
    """Raise `ConfigError`, naming the nearest known one, for options that are no keyword of `function`, and for
    keywords without a default that are not among them; its first `skip` parameters are given elsewhere."""
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    for key in options:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f'did you mean "{nearest[0]}"?' if nearest else "it takes none."
            raise ConfigError(f'{where}: unknown key "{key}"; {hint}')
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ConfigError(
                f'{where}: "{parameter.name}" is missing; {getattr(function, "__name__", "it")} needs it.'
            )
