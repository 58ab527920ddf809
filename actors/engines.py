"""Engines by the name that a configuration gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from thornback.contracts import ConfigError, Engine, EngineConfig


def _torch_engine(model: str, config: EngineConfig) -> Engine:
    from thornback.engine import TorchEngine

    return TorchEngine(model, config)


ENGINES: dict[str, Callable[[str, EngineConfig], Engine]] = {"torch": _torch_engine}


def make_engine(name: str, model: str, config: EngineConfig) -> Engine:
    """The engine `name` (or `package.module:callable`) over a model; raises `ConfigError` for an unknown name."""
    if name in ENGINES:
        return ENGINES[name](model, config)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"There is no engine {name}; take one of {', '.join(ENGINES)} or give package.module:name.")
    try:
        return getattr(importlib.import_module(module), attribute)(model, config)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The engine {name} cannot be imported ({error}); correct rollout.engine.") from error
