"""Tasks: prompts with rewards. Built-in ones by name, anybody's by import path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from thornback.contracts import ConfigError, Task
from thornback.data.importing import load_object
from thornback.data.tasks.arithmetic import ArithmeticTask
from thornback.data.tasks.math import MathTask

TASKS: dict[str, type] = {"arithmetic": ArithmeticTask, "math": MathTask}


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task `name` (arithmetic, math, or package.module:Name), made with `options` as keyword arguments.

    Raises `ConfigError` for an unknown name, or options that the task does not take.
    """
    if name not in TASKS and ":" not in name:
        raise ConfigError(f'There is no task "{name}"; built in: {", ".join(TASKS)}; or give package.module:Name.')
    make = TASKS.get(name) or load_object(name)
    if not callable(make):
        return make
    try:
        inspect.signature(make).bind(**(options or {}))
    except TypeError as error:
        known = ", ".join(inspect.signature(make).parameters)
        raise ConfigError(f"The task {name}: {error}; its options are {known}.") from None
    return make(**(options or {}))


__all__ = ["TASKS", "ArithmeticTask", "MathTask", "load_task"]
