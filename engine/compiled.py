"""Functions compiled for this CPU by numba, and run on torch's own threads.

numba keeps what it compiled, so that only a machine's first engine waits for it. Its own threads would fight torch's
for the cores, so the functions are plain loops over tasks which every thread of torch's OpenMP pool is told to enter.

numba does not see when a function that another one calls has changed in another file: touch both files.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, arg-type"
from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

# numba keeps what it compiled beside the source or in the user's cache, and refuses to keep it where it may not write.
_KEEP = any(os.access(place, os.W_OK) for place in (os.path.dirname(__file__), os.path.expanduser("~")))
# Sums may be taken in any order and products fused; infinities and NaN keep their meaning.
OPTIONS: dict[str, Any] = {"cache": _KEEP, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
_SMALL = 1 << 15  # numbers below which one thread is done before several have begun
_FLOATS = ("scaling", "epsilon")


@intrinsic
def pointer(context, address):
    """An integer as a pointer: a kernel gets its tensors as addresses."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def next_task(context, arguments):
    """Count up the first field of a kernel's arguments, atomically; returns the number before."""

    def generate(context, builder, signature, args):
        counter = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(arguments), generate


@intrinsic
def fetch(context, address):
    """Ask for the cache line at `address` ahead of its use."""

    def generate(context, builder, signature, args):
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        reading, near, data = (ir.Constant(word, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), reading, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(**OPTIONS)
def floats(address, rows, width):
    return carray(pointer(address), (rows, width), np.float32)


@njit(**OPTIONS)
def doubles(address, rows, width):
    return carray(pointer(address), (rows, width), np.float64)


@njit(**OPTIONS)
def integers(address, rows, width):
    return carray(pointer(address), (rows, width), np.int64)


def _openmp() -> Callable | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch has loaded, if any."""
    try:
        run = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


_run_parallel = _openmp()


class Kernel:
    """A function of a struct of the given fields, compiled, and called by several threads at once: each takes task
    after task by `next_task` until there are no more."""

    def __init__(self, fields: str) -> None:
        names = ("next_task", *fields.split())
        columns = [(name, ctypes.c_float if name in _FLOATS else ctypes.c_int64) for name in names]
        self._struct = type("Arguments", (ctypes.Structure,), {"_fields_": columns})

    def __call__(self, function: Callable) -> Callable[..., None]:
        compiled = cfunc(types.void(types.CPointer(from_dtype(np.dtype(self._struct)))), **OPTIONS)(function)
        struct = self._struct
        run_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)

        def run(size: int, *values: float) -> None:
            """`values`: the fields; `size`: how many numbers there are to work on."""
            arguments = struct(0, *values)
            threads = torch.get_num_threads()
            if size < _SMALL or threads == 1 or _run_parallel is None:
                run_alone(ctypes.byref(arguments))
            else:
                _run_parallel(compiled.address, ctypes.byref(arguments), threads, 0)

        return run
