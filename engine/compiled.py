"""Functions compiled for this CPU by numba, and run on torch's own threads.

numba's own threads would fight torch's for the cores, so the functions are plain loops over tasks, which every thread
of torch's OpenMP pool is told to enter.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, arg-type, attr-defined"
from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.core import cgutils, sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

from thornback.algorithms.compiled import cache_directory, kept_in

# Sums may be taken in any order and products fused; infinities and NaN keep their meaning.
OPTIONS: dict[str, Any] = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
_SOURCES = ("compiled", "vectors", "kernels", "attention_steps", "paged_attention", "products")
_SMALL = 1 << 15  # numbers below which one thread is done before several have begun
_PATIENCE = 1 << 10  # turns that a thread waits for others before it offers its core to somebody
_FLOATS = ("scaling", "epsilon")


def _cache_directory() -> str:
    return cache_directory("kernels", (Path(__file__).parent / f"{name}.py" for name in _SOURCES))


_CACHE = _cache_directory()


@intrinsic
def hold(typing_context, array):
    """Keep an array until here: where only its address is used, its memory is given back after its last mention."""

    def generate(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(array), generate


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
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "acq_rel")

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


@intrinsic
def _call(context, function, argument):
    """Call a kernel by its address."""

    def generate(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [builder.inttoptr(args[1], byte)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _ask(context, function):
    """The number that a C function without arguments returns."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _publish(context, address, value):
    """Write a number that other threads wait for, after everything that was written before."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store_atomic(args[1], place, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _seen(context, address):
    """What another thread published."""

    def generate(context, builder, signature, args):
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _pause(context):
    """Leave the core's other half alone for a moment."""

    def generate(context, builder, signature, args):
        if platform.machine() in ("x86_64", "AMD64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


def _openmp() -> tuple[Callable[..., None], int] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch uses, and the address of
    `omp_get_num_threads`. None where there is no such library (other builds of torch): kernels then run alone.

    That is the one that the process was started with, such as Intel's for vLLM, if there is one, and else the one that
    torch has loaded: of two the threads wait for work beside each other, which makes a step take twice as long.
    """
    for name in (None, "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name)
            run, count = library.GOMP_parallel, library.omp_get_num_threads
        except (OSError, AttributeError):
            continue
        run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        return run, _address(count)
    return None


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_OPENMP = _openmp()
_YIELD = _address(ctypes.CDLL(None).sched_yield)


def _num_threads() -> int:
    return 1 if _OPENMP is None else torch.get_num_threads()


def _constants(function: Callable) -> tuple:
    """The numbers that a function was made with, and those of the functions that it was made with."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return tuple(_constants(cell.py_func) if isinstance(cell, Dispatcher) else cell for cell in cells)


class _Kept(FunctionCache):
    """Numba's cache, but for the key: numba's has what a function was made with as pickled, and a compiled function is
    never pickled twice in the same way."""

    def _index_key(self, sig, codegen) -> tuple:
        return sig, codegen.magic_tuple(), _constants(self._py_func)


class Compiled:
    """A compiled function of a struct, whose first field counts the tasks that were taken."""

    def __init__(self, function: Callable, struct: type[ctypes.Structure]) -> None:
        kind = types.void(types.CPointer(from_dtype(np.dtype(struct))))
        self._function = CFunc(function, sigutils.normalize_signature(kind), locals={}, options=OPTIONS)
        if _CACHE:
            with kept_in(_CACHE):
                self._function._cache = _Kept(function)
        self._function.compile()
        self.struct = struct
        self.address = self._function.address
        self._run_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, size: int, *values: float) -> None:
        """Run once; `values`: the fields; `size`: how many numbers there are to work on."""
        self.run(self.struct(0, *values), 1 if size < _SMALL else _num_threads())

    def run(self, arguments: ctypes.Structure, threads: int) -> None:
        if threads == 1:
            self._run_alone(ctypes.byref(arguments))
        else:
            assert _OPENMP is not None
            _OPENMP[0](self.address, ctypes.byref(arguments), threads, 0)


class Kernel:
    """A function of a struct of the given fields, compiled, and called by several threads at once: each takes task
    after task by `next_task` until there are no more."""

    def __init__(self, fields: str) -> None:
        names = ("next_task", *fields.split())
        columns = [(name, ctypes.c_float if name in _FLOATS else ctypes.c_int64) for name in names]
        self._struct = type("Arguments", (ctypes.Structure,), {"_fields_": columns})

    def __call__(self, function: Callable) -> Compiled:
        return Compiled(function, self._struct)


@Kernel("calls num first last count_threads yield_core finished")
def _replay(args):
    a = carray(args, 1)[0]
    calls = integers(a.calls, a.num, 2)
    threads = 1 if a.count_threads == 0 else _ask(a.count_threads)
    for i in range(a.first, a.last):
        _call(calls[i, 0], calls[i, 1])
        done = i - a.first + 1
        if next_task(args) == done * threads - 1:  # the last to arrive
            integers(calls[i, 1], 1, 1)[0, 0] = 0
            _publish(a.finished, done)
            continue
        spins = 0
        while _seen(a.finished) < done:
            _pause()
            spins += 1
            if spins % _PATIENCE == 0:
                _ask(a.yield_core)


class Program:
    """Calls of kernels, one after the other, by all threads: each begins when every thread has left the one before,
    without a word of Python in between."""

    def __init__(self, calls: list[tuple[Compiled, ctypes.Structure]]) -> None:
        self._calls = calls  # their structs stay where they are
        self._addresses = np.array([(kernel.address, ctypes.addressof(struct)) for kernel, struct in calls], np.int64)

    def run(self, first: int, last: int, threads: int | None = None) -> None:
        """Calls `first` to `last - 1`, by so many threads (default: torch's)."""
        threads, finished = threads or _num_threads(), ctypes.c_int64(0)
        count = _OPENMP[1] if _OPENMP is not None and threads > 1 else 0
        calls = self._addresses
        _replay.run(
            _replay.struct(0, calls.ctypes.data, len(calls), first, last, count, _YIELD, ctypes.addressof(finished)),
            threads,
        )
