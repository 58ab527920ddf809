"""Engines by the name that a configuration gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from thornback.contracts import ConfigError, Engine, EngineConfig, Retriever


def _torch_engine(model: str, config: EngineConfig, retrievers: tuple[Retriever, ...] = ()) -> Engine:
    from thornback.engine import TorchEngine

    return TorchEngine(model, config, retrievers)


ENGINES: dict[str, Callable[..., Engine]] = {"torch": _torch_engine}


def make_engine(name: str, model: str, config: EngineConfig, retrievers: tuple[Retriever, ...] = ()) -> Engine:
    """The engine `name` (or `package.module:callable`) over a model; raises `ConfigError` for an unknown name.

    `retrievers`, if there are any, are the engine's third argument: what it may speculate from."""
    arguments = (model, config, retrievers) if retrievers else (model, config)
    if name in ENGINES:
        return ENGINES[name](*arguments)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"There is no engine {name}; take one of {', '.join(ENGINES)} or give package.module:name.")
    try:
        return getattr(importlib.import_module(module), attribute)(*arguments)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The engine {name} cannot be imported ({error}); correct rollout.engine.") from error
