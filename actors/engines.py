"""Engines by the name that a configuration gives them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from thornback.contracts import ConfigError, Engine, EngineConfig, Retriever


def _torch_engine(model: str, config: EngineConfig, retrievers: tuple[Retriever, ...] = ()) -> Engine:
    from thornback.engine import TorchEngine

    return TorchEngine(model, config, retrievers)


def _vllm_engine(model: str, config: EngineConfig, retrievers: tuple[Retriever, ...] = (), **options: Any) -> Engine:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("The engine vllm needs vLLM, which is not installed here; see docs/vllm.md, or take torch.")
    from thornback.engine.vllm_engine import VllmEngine

    return VllmEngine(model, config, retrievers, **options)


def _best_engine(model: str, config: EngineConfig, retrievers: tuple[Retriever, ...] = (), **options: Any) -> Engine:
    """vLLM on a GPU, where it is installed and nothing is asked for that it does not do; `options` are vLLM's."""
    import torch

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    heads = config.speculation is not None and config.speculation.draft  # it may be one, which vLLM cannot ask
    if on_gpu and not config.kv_location and not heads and importlib.util.find_spec("vllm") is not None:
        return _vllm_engine(model, config, retrievers, **options)
    return _torch_engine(model, config, retrievers)


ENGINES: dict[str, Callable[..., Engine]] = {"torch": _torch_engine, "vllm": _vllm_engine, "auto": _best_engine}


def make_engine(
    name: str,
    model: str,
    config: EngineConfig,
    retrievers: tuple[Retriever, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Engine:
    """The engine `name` (or `package.module:callable`) over a model; raises `ConfigError` for an unknown name.

    `retrievers`, if there are any, are the engine's third argument: what it may speculate from. `options` are keyword
    arguments of its own."""
    arguments = (model, config, retrievers) if retrievers else (model, config)
    if name in ENGINES:
        return ENGINES[name](*arguments, **(options or {}))
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"There is no engine {name}; take one of {', '.join(ENGINES)} or give package.module:name.")
    try:
        engine = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"The engine {name} cannot be imported ({error}); correct rollout.engine.") from error
    return engine(*arguments, **(options or {}))
