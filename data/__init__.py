"""Prompts in, rollouts out: tasks and their rewards, readers, writers, and the character tokenizer.

Names load when they are first used: checking a recipe must not wait for Ray, torch or transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thornback.data.imports import load_object as load_object
    from thornback.data.rewards import Brevity as Brevity
    from thornback.data.rewards import Correct as Correct
    from thornback.data.rewards import Format as Format
    from thornback.data.rewards import FunctionReward as FunctionReward
    from thornback.data.scorer import RuleScorer as RuleScorer
    from thornback.data.scorer import select_rewards as select_rewards
    from thornback.data.tasks import TASKS as TASKS
    from thornback.data.tasks import load_task as load_task
    from thornback.data.tasks.arithmetic import ArithmeticTask as ArithmeticTask
    from thornback.data.tokenizer import character_tokenizer as character_tokenizer
    from thornback.data.tokenizer import render_prompt as render_prompt

_HOMES = {
    "ArithmeticTask": "tasks.arithmetic",
    "Brevity": "rewards",
    "Correct": "rewards",
    "Format": "rewards",
    "FunctionReward": "rewards",
    "RuleScorer": "scorer",
    "TASKS": "tasks",
    "character_tokenizer": "tokenizer",
    "load_object": "imports",
    "load_task": "tasks",
    "render_prompt": "tokenizer",
    "select_rewards": "scorer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
