"""What vLLM is started with: its environment, and its `EngineArgs` of a configuration of ours."""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from thornback.contracts import ConfigError, EngineConfig, ModelError
from thornback.engine.vllm_speculation import speculative_config

# Read when vLLM is imported: one process, whose cores other actors share, and the model runner whose sampler is ours.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def set_environment(num_threads: int | None) -> None:
    """Before vLLM is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if num_threads:
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)


def device() -> str:
    """What vLLM's build runs on: cpu or cuda."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def engine_args(model: str, config: EngineConfig, options: Mapping[str, Any]) -> Any:
    """vLLM's `EngineArgs`; `options` are such as well, and come first. Raises `ConfigError` for what does not go
    together, and `ModelError` for a model that vLLM cannot run here."""
    from vllm import EngineArgs

    _check_options(options, [f.name for f in fields(EngineArgs)])
    several = [name for name in _PARALLEL if options.get(name, 1) > 1]
    if several and (config.speculation or config.kv_location):
        raise ConfigError(
            "Several workers of vLLM share neither guesses nor what they hand over: leave speculation and prefill "
            f"replicas out, or take {several[0]}=1."
        )
    _show_no_names()
    on_cpu = device() == "cpu"
    if config.device not in ("auto", device()):
        raise ConfigError(
            f"This vLLM was built for {'CPUs' if on_cpu else 'GPUs'} and runs on nothing else, but device is "
            f"{config.device}; leave it out, install the other build (docs/vllm.md), or take the torch engine."
        )
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": ("float32" if on_cpu else "bfloat16") if config.dtype == "auto" else config.dtype,
        "max_model_len": config.max_model_len or -1,  # what the cache holds, as with the torch engine
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "num_gpu_blocks_override": config.num_blocks,
        "max_logprobs": -1,
        "disable_log_stats": True,
        "enforce_eager": on_cpu,  # compiling takes longer there than it saves
        "async_scheduling": False,  # a draw's position is the number of tokens before it
        "worker_extension_cls": "thornback.engine.vllm_worker.WorkerExtension",
    }
    if config.speculation is not None:
        arguments["speculative_config"] = speculative_config(config.speculation)
    if config.kv_location:
        arguments["kv_transfer_config"] = {
            "kv_connector": "FlowKVConnector",
            "kv_connector_module_path": "thornback.engine.vllm_connector",
            "kv_role": "kv_both",
        }
    if "gpu_memory_utilization" in options:  # which sizes the cache only where nothing else does
        del arguments["kv_cache_memory_bytes"]
    if config.adapters:
        # On CPU a request without an adapter gets the last place's, beside one that has one: it stays empty.
        places = len(config.adapters) + on_cpu
        arguments |= {"enable_lora": True, "max_loras": places, "max_lora_rank": _rank(config)}
    args = EngineArgs(**{**arguments, **options})
    head_size = args.create_model_config().get_head_size()
    if on_cpu and head_size % 32:  # its first pass would say so, in words of its kernels
        raise ModelError(
            f"{model} has heads of {head_size} numbers; vLLM's attention on CPU takes multiples of 32 only. Take the "
            "torch engine, or build the model with such a head_dim."
        )
    return args


def _check_options(options: Mapping[str, Any], known: list[str]) -> None:
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"vLLM's engine has no argument {name}; did you mean {nearest}?")


def _show_no_names() -> None:
    """vLLM on CPU reads the `__dict__` of everything that modules hold; numba's library of C functions takes that for
    the name of one, and vLLM fails on what it gets."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is not None:
        ffi.lib._fntab["__dict__"] = {}


def _rank(config: EngineConfig) -> int:
    """The largest of the adapters' ranks, as vLLM wants to know it."""
    ranks = [json.loads(Path(path, "adapter_config.json").read_text())["r"] for _, path in config.adapters]
    return max(8, 1 << (max(ranks) - 1).bit_length())
