"""The Triton kernel computes what attention is, under Triton's interpreter; and it compiles for GPUs."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thornback.engine import device_tokens, kernels
from thornback.engine.attention import NO_TREE, PagedBatch
from thornback.engine.device_tokens import DeviceTokens
from thornback.engine.paged_attention import PagedTokens

CASES = Path(__file__).with_name("triton_cases.py")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*command: str, **variables: str) -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, *command], env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.full
def test_under_the_interpreter() -> None:
    run("-m", "pytest", "-p", "no:cacheprovider", str(CASES), TRITON_INTERPRET="1")


@pytest.mark.full
def test_who_needs_none_of_the_kernel_does_not_load_it() -> None:
    loaded = "{'thornback.engine.attention', 'thornback.engine.triton_attention'} & set(sys.modules)"
    run("-c", f"import sys; from thornback.engine import TorchEngine; assert len({loaded}) == 1")


def test_the_compiled_kernels_stay_the_default_on_a_cpu(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pool = torch.zeros(4, 1, 2, 1, 16, 8)
    with torch.inference_mode():
        assert kernels.usable(pool)
        batch = PagedBatch.of(pool, [1, 1], [3, 9], [[0], [1]])
    assert batch.direct is not None
    assert batch.on_device is None


def test_why_a_gpu_goes_without_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    device_tokens._runs_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not any(device_tokens._runs_on(torch.device("cuda:0")) for _ in range(3))
    device_tokens._runs_on.cache_clear()
    assert [r.getMessage() for r in caplog.records if "Triton is not installed" in r.getMessage()] == [
        "Triton is not installed: keys and values are gathered for torch's attention in every pass on cuda:0."
    ]


@given(st.lists(st.integers(1, 70), min_size=1, max_size=9), st.integers(1, 70))
def test_tiles_hold_every_token_once_and_none_of_two_sequences(counts, most) -> None:
    owners = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    numbers = torch.arange(len(owners))
    at = PagedTokens(numbers, owners, numbers + 1, numbers + NO_TREE, numbers, torch.zeros(len(counts), 9).long())
    tokens = DeviceTokens.of(at, torch.device("cpu"))
    assert (tokens.run, tokens.longest) == (max(counts), len(owners))
    starts, sizes = tokens.tiles(most).tolist()
    spread = [start + i for start, size in zip(starts, sizes, strict=True) for i in range(size)]
    assert spread == numbers.tolist()
    assert all(1 <= size <= most for size in sizes)
    assert all(len(set(owners[a : a + n].tolist())) == 1 for a, n in zip(starts, sizes, strict=True))
    assert len(starts) == sum(-(-count // most) for count in counts)


GPUS = {"Ampere": 80, "GeForce": 86, "Hopper": 90}
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
SHAPES = [(4, 128, 63, 0), (7, 80, 1, 0), (1, 64, 4, 4096), (8, 256, 63, 0)]  # heads of a group, width, run, window
QUICK = [("Hopper", "bfloat16", SHAPES[0]), ("Ampere", "float16", SHAPES[1])]
REST = [one for one in itertools.product(GPUS, POINTERS, SHAPES) if one not in QUICK]


def build(kernel, gpu: str, types: dict[str, str], constants: dict, options: dict):
    """To machine code, by the compiler and the assembler that Triton brings: it needs no GPU."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name.endswith("stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton_compile(source, target=GPUTarget("cuda", GPUS[gpu], 32), options=options)
    assert built.asm["cubin"]
    return built


@needs_triton
@pytest.mark.parametrize(
    ("gpu", "dtype", "shape"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.full) for one in REST)]
)
def test_kernels_compile_for_gpus(gpu, dtype, shape, tmp_path, monkeypatch) -> None:
    """With matrix units, and for the memory that even a GeForce has, where a block may have 99 KiB."""
    from thornback.engine import triton_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (group, width, run, window), pointer = shape, POINTERS[dtype]
    constants = triton_attention.sizes(group, width, run, getattr(torch, dtype).itemsize)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    split = run == 1
    if split:
        types = {"parts": "*fp32", "norms": "*fp32", "out": pointer, "numbers": "*i64"}
        build(triton_attention._merge, gpu, types, {"D": width, "WIDTH": constants["WIDTH"], "SHARES": 32}, {})
    constants |= {"GROUP": group, "D": width, "SIZE": 32, "WINDOW": window, "SPLIT": split, "WIDEN": False}
    types = dict.fromkeys(("query", "keys", "values"), pointer)
    types |= dict.fromkeys(("out", "norms"), "*fp32" if split else pointer)
    types |= dict.fromkeys(("numbers", "tiles", "tables"), "*i64") | {"scaling": "fp32"}
    built = build(triton_attention._attend, gpu, types, constants, options)
    assert built.metadata.shared <= 99 << 10
    if dtype != "float32":
        assert "mma" in built.asm["ptx"]
