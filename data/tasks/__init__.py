"""Tasks: prompts with rewards. Built-in ones by name, anybody's by import path."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from thornback.contracts import ConfigError, Task
from thornback.data.importing import load_object
from thornback.data.tasks.arithmetic import ArithmeticTask
from thornback.data.tasks.math import MathTask
from thornback.data.tasks.multihop import MultihopTask
from thornback.data.tasks.tools import ToolsTask
from thornback.data.tasks.verifiers import VerifiersTask

TASKS: dict[str, type] = {
    "arithmetic": ArithmeticTask,
    "math": MathTask,
    "multihop": MultihopTask,
    "tools": ToolsTask,
    "verifiers": VerifiersTask,
}


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task `name`, a built-in one's or package.module:Name, made with `options` as keywords.

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


__all__ = ["TASKS", "ArithmeticTask", "MathTask", "MultihopTask", "ToolsTask", "VerifiersTask", "load_task"]
