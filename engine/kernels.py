"""The parts of a forward pass that torch has no fast operator for, compiled for this CPU by numba.

For float32 tensors without gradients. numba keeps what it compiled, so that only a machine's first engine waits for it.
The kernels run on torch's own OpenMP threads: threads of another pool would fight them for the cores.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, float32, from_dtype, njit, types
from numba.extending import intrinsic
from torch import Tensor

_NEIGHBOURS = 8  # tokens whose attention one thread computes block by block: a block they share is read once
_ROWS = 32  # rows that a thread takes at a time
_SPAN = 64  # tokens whose weights are summed before a draw looks inside
_TINY = float32(1e-37)  # what _exponentials makes of minus infinity is below
_SMALL = 1 << 15  # numbers below which one thread is done before several have begun
# Sums may be taken in any order and products fused; infinities and NaN keep their meaning.
_OPTIONS: dict[str, Any] = {"cache": True, "fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
_FLOATS = ("scaling", "epsilon")


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on tensors like `x`."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()


# How a kernel is called


@intrinsic
def _pointer(context, address):
    """An integer as a pointer: a kernel gets its tensors as addresses."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _next_task(context, arguments):
    """Count up the first field of a kernel's arguments, atomically; returns the number before."""

    def generate(context, builder, signature, args):
        counter = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(arguments), generate


@intrinsic
def _fetch(context, address):
    """Ask for the cache line at `address` ahead of its use."""

    def generate(context, builder, signature, args):
        word, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        reading, near, data = (ir.Constant(word, value) for value in (0, 2, 1))
        builder.call(function, [builder.inttoptr(args[0], byte), reading, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(**_OPTIONS)
def _floats(address, rows, width):
    return carray(_pointer(address), (rows, width), np.float32)


@njit(**_OPTIONS)
def _doubles(address, rows, width):
    return carray(_pointer(address), (rows, width), np.float64)


@njit(**_OPTIONS)
def _integers(address, rows, width):
    return carray(_pointer(address), (rows, width), np.int64)


def _openmp() -> Callable | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch has loaded, if it has one."""
    try:
        run = ctypes.CDLL("libgomp.so.1").GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


_run_parallel = _openmp()


class _Kernel:
    """A function of a struct of the given fields, compiled, and called by several threads at once: each takes task
    after task by `_next_task` until there are no more."""

    def __init__(self, fields: str) -> None:
        columns = [(name, np.float32 if name in _FLOATS else np.int64) for name in ("next_task", *fields.split())]
        self._struct = np.dtype(columns, align=True)

    def __call__(self, function: Callable) -> Callable[..., None]:
        compiled = cfunc(types.void(types.CPointer(from_dtype(self._struct))), **_OPTIONS)(function)
        run_alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)

        def run(size: int, *values: float) -> None:
            """`values`: the fields; `size`: how many numbers there are to work on."""
            arguments = np.array((0, *values), self._struct)
            threads = torch.get_num_threads()
            if size < _SMALL or threads == 1 or _run_parallel is None:
                run_alone(arguments.ctypes.data)
            else:
                _run_parallel(compiled.address, arguments.ctypes.data, threads, 0)

        return run


# Attention


@njit(inline="always", **_OPTIONS)
def _exponentials(x):
    """exp of numbers of at most 0, in place, to 1e-7, in a form that becomes vector instructions: 2**n * 2**f."""
    bits = x.view(np.int32)
    for t in range(len(x)):
        z = max(x[t] * float32(1.4426950408889634), float32(-126.0))
        n = np.floor(z)
        f = z - n
        p = float32(1.8775767e-3)
        p = p * f + float32(8.9893397e-3)
        p = p * f + float32(5.5826318e-2)
        p = p * f + float32(2.4015361e-1)
        p = p * f + float32(6.9315308e-1)
        p = p * f + float32(9.9999994e-1)
        x[t] = p
        bits[t] += np.int32(n) << np.int32(23)


@njit(inline="always", **_OPTIONS)
def _score(query, q, pool, key, start, stop, width, scaling, scores, at):
    """Products of row `q` of `query` with rows `key + start` to `key + stop` of `pool`, four at a time."""
    t = start
    while t + 4 <= stop:
        a, b, c, d = float32(0), float32(0), float32(0), float32(0)
        for i in range(width):
            x = query[q, i]
            a += x * pool[key + t, i]
            b += x * pool[key + t + 1, i]
            c += x * pool[key + t + 2, i]
            d += x * pool[key + t + 3, i]
        scores[at + t], scores[at + t + 1] = a * scaling, b * scaling
        scores[at + t + 2], scores[at + t + 3] = c * scaling, d * scaling
        t += 4
    while t < stop:
        a = float32(0)
        for i in range(width):
            a += query[q, i] * pool[key + t, i]
        scores[at + t] = a * scaling
        t += 1


@njit(inline="always", **_OPTIONS)
def _add_values(weights, at, pool, value, start, stop, width, sums, row):
    """Add rows `value + start` to `value + stop` of `pool`, by their weights, to `sums[row]`."""
    t = start
    while t + 4 <= stop:
        a, b, c, d = weights[at + t], weights[at + t + 1], weights[at + t + 2], weights[at + t + 3]
        for i in range(width):
            sums[row, i] += (
                a * pool[value + t, i]
                + b * pool[value + t + 1, i]
                + c * pool[value + t + 2, i]
                + d * pool[value + t + 3, i]
            )
        t += 4
    while t < stop:
        for i in range(width):
            sums[row, i] += weights[at + t] * pool[value + t, i]
        t += 1


@functools.cache
def _paged_attention(heads: int, kv_heads: int, width: int) -> Callable[..., None]:
    """Compiled for one shape of heads: with a constant width a row stays in registers, which is twice as fast."""
    group = heads // kv_heads

    @_Kernel(
        "query out num_tokens pool pool_rows layer_row block_rows size num tokens owners lengths tables num_tables max_blocks "
        "window scaling"
    )
    def attend(args):
        a = carray(args, 1)[0]
        num, size, layer_row, block_rows, window, scaling = a.num, a.size, a.layer_row, a.block_rows, a.window, a.scaling
        query, out = _floats(a.query, a.num_tokens * heads, width), _floats(a.out, a.num_tokens * heads, width)
        pool, tables = _floats(a.pool, a.pool_rows, width), _integers(a.tables, a.num_tables, a.max_blocks)
        tokens, owners, lengths = _integers(a.tokens, 1, num), _integers(a.owners, 1, num), _integers(a.lengths, 1, num)
        peak = np.empty(_NEIGHBOURS * group, np.float32)
        total = np.empty(_NEIGHBOURS * group, np.float32)
        sums = np.empty((_NEIGHBOURS * group, width), np.float32)
        scores = np.empty(group * size, np.float32)
        while True:
            task = _next_task(args)
            first, head = task // kv_heads * _NEIGHBOURS, task % kv_heads
            if first >= num:
                break
            last = min(first + _NEIGHBOURS, num)
            peak[:], total[:], sums[:] = -np.inf, 0, 0
            longest = 0
            for s in range(first, last):
                longest = max(longest, lengths[0, s])
            for j in range((longest + size - 1) // size):
                for s in range(first, last):
                    start, stop = max(0, lengths[0, s] - window - j * size), min(size, lengths[0, s] - j * size)
                    if start >= stop:
                        continue
                    block = tables[owners[0, s], j]
                    key = block * block_rows + layer_row + head * size
                    value = key + kv_heads * size
                    if stop == size and lengths[0, s] > (j + 1) * size:
                        ahead = tables[owners[0, s], j + 1]
                        if s == first or ahead != tables[owners[0, s - 1], j + 1]:
                            at_key = a.pool + (ahead * block_rows + layer_row + head * size) * width * 4
                            at_value = at_key + kv_heads * size * width * 4
                            for line in range(0, size * width * 4, 64):
                                _fetch(at_key + line)
                                _fetch(at_value + line)
                    q = tokens[0, s] * heads + head * group
                    scores[:] = -126
                    for g in range(group):
                        at, row = g * size, (s - first) * group + g
                        _score(query, q + g, pool, key, start, stop, width, scaling, scores, at)
                        before = peak[row]
                        top = before
                        for t in range(start, stop):
                            top = max(top, scores[at + t])
                        for t in range(start, stop):
                            scores[at + t] -= top
                        if top > before:
                            shrink = np.exp(before - top)
                            peak[row] = top
                            total[row] *= shrink
                            for i in range(width):
                                sums[row, i] *= shrink
                    _exponentials(scores)
                    for g in range(group):
                        at, row = g * size, (s - first) * group + g
                        weight = float32(0)
                        for t in range(start, stop):
                            weight += scores[at + t]
                        total[row] += weight
                        _add_values(scores, at, pool, value, start, stop, width, sums, row)
            for s in range(first, last):
                for g in range(group):
                    row, q = (s - first) * group + g, tokens[0, s] * heads + head * group + g
                    for i in range(width):
                        out[q, i] = sums[row, i] / total[row]

    return attend


def paged_attention(
    query: Tensor, pool: Tensor, layer: int, tokens: Tensor, owners: Tensor, lengths: Tensor, tables: Tensor,
    window: int | None, scaling: float, out: Tensor,
) -> None:  # fmt: skip
    """Attention of some of a pass's tokens over the pool `[blocks, layers, 2, kv_heads, block_size, D]`.

    `query` and `out` `[T, heads, D]`, of which rows `tokens` `[n]` are read and written; `owners` `[n]`: the row of
    `tables` `[B, N]` that holds a token's blocks; `lengths` `[n]`: how many keys it sees. The integers are int64.
    """
    num_tokens, heads, width = query.shape
    _, layers, _, kv_heads, block_size, _ = pool.shape
    rows = 2 * kv_heads * block_size
    _paged_attention(heads, kv_heads, width)(
        len(tokens) * tables.shape[1] * block_size * width, query.data_ptr(), out.data_ptr(), num_tokens,
        pool.data_ptr(), pool.numel() // width, layer * rows, layers * rows, block_size,
        len(tokens), tokens.data_ptr(), owners.data_ptr(), lengths.data_ptr(),
        tables.data_ptr(), len(tables), tables.shape[1], window or 1 << 40, scaling,
    )  # fmt: skip


@_Kernel("keys values num width pool pool_rows slots layer_row value_rows")
def _store(args):
    a = carray(args, 1)[0]
    keys, values, pool = _floats(a.keys, a.num, a.width), _floats(a.values, a.num, a.width), _floats(a.pool, a.pool_rows, a.width)
    slots = _integers(a.slots, 1, a.num)[0]
    while True:
        first = _next_task(args) * _ROWS
        if first >= a.num:
            break
        for row in range(first, min(a.num, first + _ROWS)):
            slot = slots[row] + a.layer_row
            for i in range(a.width):
                pool[slot, i] = keys[row, i]
                pool[slot + a.value_rows, i] = values[row, i]


def store(keys: Tensor, values: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
    """Write `keys` and `values` `[T, kv_heads, D]` to their places in the pool: `slots` `[T * kv_heads]` as in
    `PagedBatch`."""
    _, _, _, kv_heads, block_size, width = pool.shape
    rows = kv_heads * block_size
    _store(keys.numel(), keys.data_ptr(), values.data_ptr(), slots.numel(), width, pool.data_ptr(),
           pool.numel() // width, slots.data_ptr(), layer * 2 * rows, rows)  # fmt: skip


# Sampling


@_Kernel("scores num vocabulary uniform greedy tokens logprobs log_norm")
def _draw(args):
    a = carray(args, 1)[0]
    n = a.vocabulary
    scores, uniform = _floats(a.scores, a.num, n), _doubles(a.uniform, 1, a.num)
    greedy, tokens = _integers(a.greedy, 1, a.num), _integers(a.tokens, 1, a.num)
    logprobs, log_norm = _floats(a.logprobs, 1, a.num), _floats(a.log_norm, 1, a.num)
    weights, spans = np.empty(n, np.float32), np.empty((n + _SPAN - 1) // _SPAN, np.float64)
    while True:
        row = _next_task(args)
        if row >= a.num:
            break
        peak = float32(-np.inf)
        for i in range(n):
            peak = max(peak, scores[row, i])
        for i in range(n):
            weights[i] = scores[row, i] - peak
        _exponentials(weights)
        total = 0.0
        for span in range(len(spans)):
            some = float32(0)
            for i in range(span * _SPAN, min(n, span * _SPAN + _SPAN)):
                some += weights[i]
            spans[span] = some
            total += spans[span]
        token = -1
        if greedy[0, row]:
            token = np.argmax(weights)
        else:
            target, reached = uniform[0, row] * total, 0.0
            for span in range(len(spans)):
                if reached + spans[span] > target:
                    for i in range(span * _SPAN, min(n, span * _SPAN + _SPAN)):
                        reached += weights[i]
                        if reached > target:
                            token = i
                            break
                    else:
                        token = min(n, span * _SPAN + _SPAN) - 1  # the span's sum was rounded up
                    break
                reached += spans[span]
            else:
                token = n - 1
            # Rounding may carry a target past the last weight: the last token that has any is meant.
            while weights[token] < _TINY:
                token -= 1
        log_norm[0, row] = np.log(total) + peak
        logprobs[0, row] = scores[row, token] - log_norm[0, row]
        tokens[0, row] = token


def draw(scores: Tensor, uniform: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first token of each row of `scores` `[B, V]` at which the cumulative softmax exceeds `uniform` `[B]` (float64),
    or where `greedy` `[B]` (int64) is not 0 the likeliest; its log-probability; and the logarithm of the row's sum."""
    num, vocabulary = scores.shape
    tokens, logprobs, log_norm = uniform.new_empty(num, dtype=torch.int64), scores.new_empty(num), scores.new_empty(num)
    _draw(scores.numel(), scores.data_ptr(), num, vocabulary, uniform.data_ptr(), greedy.data_ptr(), tokens.data_ptr(),
          logprobs.data_ptr(), log_norm.data_ptr())  # fmt: skip
    return tokens, logprobs, log_norm


# What stands between the matrix products


@_Kernel("x out weight num width epsilon")
def _rms_norm(args):
    a = carray(args, 1)[0]
    x, out, weight = _floats(a.x, a.num, a.width), _floats(a.out, a.num, a.width), _floats(a.weight, 1, a.width)[0]
    while True:
        first = _next_task(args) * _ROWS
        if first >= a.num:
            break
        for row in range(first, min(a.num, first + _ROWS)):
            squares = float32(0)
            for i in range(a.width):
                squares += x[row, i] * x[row, i]
            scale = float32(1) / np.sqrt(squares / float32(a.width) + a.epsilon)
            for i in range(a.width):
                out[row, i] = x[row, i] * scale * weight[i]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x` `[..., D]` over its root mean square, times `weight` `[D]`."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    _rms_norm(x.numel(), x.data_ptr(), out.data_ptr(), weight.data_ptr(), x.numel() // width, width, epsilon)
    return out


@_Kernel("x num heads width cos sin weight epsilon")
def _rotate(args):
    a = carray(args, 1)[0]
    half = a.width // 2
    x, weight = _floats(a.x, a.num * a.heads, a.width), _floats(a.weight, 1, a.width)[0]
    cos, sin = _floats(a.cos, a.num, half), _floats(a.sin, a.num, half)
    while True:
        first = _next_task(args) * _ROWS
        if first >= a.num:
            break
        for token in range(first, min(a.num, first + _ROWS)):
            for row in range(token * a.heads, (token + 1) * a.heads):
                if a.weight:
                    squares = float32(0)
                    for i in range(a.width):
                        squares += x[row, i] * x[row, i]
                    scale = float32(1) / np.sqrt(squares / float32(a.width) + a.epsilon)
                    for i in range(a.width):
                        x[row, i] = x[row, i] * scale * weight[i]
                for i in range(half):
                    left, right = x[row, i], x[row, i + half]
                    x[row, i] = left * cos[token, i] - right * sin[token, i]
                    x[row, i + half] = right * cos[token, i] + left * sin[token, i]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """In place: `rms_norm` of each head of `x` `[T, heads, D]` if there is a weight, then its rotation by the angles
    whose `cos` and `sin` `[T, D / 2]` are given."""
    num, heads, width = x.shape
    _rotate(x.numel(), x.data_ptr(), num, heads, width, cos.data_ptr(), sin.data_ptr(),
            0 if weight is None else weight.data_ptr(), epsilon)  # fmt: skip


@_Kernel("gate up num width")
def _silu_product(args):
    a = carray(args, 1)[0]
    gate, up = _floats(a.gate, a.num, a.width), _floats(a.up, a.num, a.width)
    below = np.empty(a.width, np.float32)
    while True:
        first = _next_task(args) * _ROWS
        if first >= a.num:
            break
        for row in range(first, min(a.num, first + _ROWS)):
            for i in range(a.width):
                below[i] = -abs(gate[row, i])
            _exponentials(below)
            for i in range(a.width):
                # exp of numbers of at most 0 only: sigmoid(x) is 1 / (1 + e) above zero and e / (1 + e) below.
                e = below[i]
                gate[row, i] *= up[row, i] * (float32(1) if gate[row, i] >= 0 else e) / (float32(1) + e)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, in place of `gate`; both `[..., D]`."""
    width = gate.shape[-1]
    _silu_product(gate.numel(), gate.data_ptr(), up.data_ptr(), gate.numel() // width, width)
    return gate
