"""Jobs: warm start, pre-sampling, reinforcement learning, evaluation. Names load when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thornback.train.build import build_model as build_model
    from thornback.train.config import RunConfig as RunConfig
    from thornback.train.config import load_recipe as load_recipe
    from thornback.train.config import make_config as make_config
    from thornback.train.jobs import evaluate as evaluate
    from thornback.train.jobs import presample as presample
    from thornback.train.trainer import RunResult as RunResult
    from thornback.train.trainer import Trainer as Trainer

# A recipe's error must be seen at once, so nothing here may pull in torch or Ray before it is needed.
_HOMES = {
    "RunConfig": "config",
    "RunResult": "trainer",
    "Trainer": "trainer",
    "build_model": "build",
    "evaluate": "jobs",
    "load_recipe": "config",
    "make_config": "config",
    "presample": "jobs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
