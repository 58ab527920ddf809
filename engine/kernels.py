"""The parts of a forward pass that torch has no fast operator for, in float32 on CPU, without gradients."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, var-annotated"
from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import carray, float32, njit
from torch import Tensor

from thornback.engine.compiled import (
    OPTIONS,
    Kernel,
    doubles,
    fetch,
    floats,
    integers,
    next_task,
)

_NEIGHBOURS = 8  # tokens whose attention one thread computes block by block: a block they share is read once
_ROWS = 32  # rows that a thread takes at a time
_SPAN = 64  # tokens whose weights are summed before a draw looks inside
_TINY = float32(1e-37)  # what `_exponentials` makes of minus infinity is below


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on tensors like `x`."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()


def _by_token(x: Tensor) -> Tensor:
    """`x` `[T, heads, D]`, or a copy, in which a token's heads lie together; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


# Attention


@njit(inline="always", **OPTIONS)
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


@njit(inline="always", **OPTIONS)
def _score(query, token, column, pool, key, start, stop, width, scaling, scores, at):
    """Products of `query[token, column : column + width]` with rows `key + start` to `key + stop` of `pool`."""
    t = start
    while t + 4 <= stop:
        a, b, c, d = float32(0), float32(0), float32(0), float32(0)
        for i in range(width):
            x = query[token, column + i]
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
            a += query[token, column + i] * pool[key + t, i]
        scores[at + t] = a * scaling
        t += 1


@njit(inline="always", **OPTIONS)
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

    @Kernel(
        "query query_stride out num_tokens pool pool_rows layer_row block_rows size "
        "num tokens owners lengths tables num_tables max_blocks window scaling"
    )
    def attend(args):
        a = carray(args, 1)[0]
        num, size, window, scaling = a.num, a.size, a.window, a.scaling
        layer_row, block_rows = a.layer_row, a.block_rows
        query, out = floats(a.query, a.num_tokens, a.query_stride), floats(a.out, a.num_tokens, heads * width)
        pool, tables = floats(a.pool, a.pool_rows, width), integers(a.tables, a.num_tables, a.max_blocks)
        tokens, owners, lengths = integers(a.tokens, 1, num), integers(a.owners, 1, num), integers(a.lengths, 1, num)
        peak = np.empty(_NEIGHBOURS * group, np.float32)
        total = np.empty(_NEIGHBOURS * group, np.float32)
        sums = np.empty((_NEIGHBOURS * group, width), np.float32)
        scores = np.empty(group * size, np.float32)
        while True:
            task = next_task(args)
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
                                fetch(at_key + line)
                                fetch(at_value + line)
                    scores[:] = -126
                    for g in range(group):
                        at, row = g * size, (s - first) * group + g
                        column = (head * group + g) * width
                        _score(query, tokens[0, s], column, pool, key, start, stop, width, scaling, scores, at)
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
                    row, column = (s - first) * group + g, (head * group + g) * width
                    for i in range(width):
                        out[tokens[0, s], column + i] = sums[row, i] / total[row]

    return attend


def paged_attention(
    query: Tensor, pool: Tensor, layer: int, tokens: Tensor, owners: Tensor, lengths: Tensor, tables: Tensor,
    window: int | None, scaling: float, out: Tensor,
) -> None:  # fmt: skip
    """Attention of some of a pass's tokens over the pool `[blocks, layers, 2, kv_heads, block_size, D]`.

    `query` and `out` `[T, heads, D]`, of which rows `tokens` `[n]` are read and written; `owners` `[n]`: the row of
    `tables` `[B, N]` that holds a token's blocks; `lengths` `[n]`: how many keys it sees. The integers are int64.
    """
    query = _by_token(query)
    num_tokens, heads, width = query.shape
    _, layers, _, kv_heads, block_size, _ = pool.shape
    rows = 2 * kv_heads * block_size
    _paged_attention(heads, kv_heads, width)(
        len(tokens) * tables.shape[1] * block_size * width,
        query.data_ptr(), query.stride(0), out.data_ptr(), num_tokens,
        pool.data_ptr(), pool.numel() // width, layer * rows, layers * rows, block_size,
        len(tokens), tokens.data_ptr(), owners.data_ptr(), lengths.data_ptr(),
        tables.data_ptr(), len(tables), tables.shape[1], window or 1 << 40, scaling,
    )  # fmt: skip


@Kernel("keys values key_stride value_stride num heads width pool pool_rows slots layer_row value_rows")
def _store(args):
    a = carray(args, 1)[0]
    keys, values = floats(a.keys, a.num, a.key_stride), floats(a.values, a.num, a.value_stride)
    pool, slots = floats(a.pool, a.pool_rows, a.width), integers(a.slots, a.num, a.heads)
    heads, width, layer_row, value_rows = a.heads, a.width, a.layer_row, a.value_rows
    while True:
        first = next_task(args) * _ROWS
        if first >= a.num:
            break
        for token in range(first, min(a.num, first + _ROWS)):
            for head in range(heads):
                slot = slots[token, head] + layer_row
                for i in range(width):
                    pool[slot, i] = keys[token, head * width + i]
                    pool[slot + value_rows, i] = values[token, head * width + i]


def store(keys: Tensor, values: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
    """Write `keys` and `values` `[T, kv_heads, D]` to their places in the pool: `slots` `[T * kv_heads]` as in
    `PagedBatch`."""
    keys, values = _by_token(keys), _by_token(values)
    num, heads, width = keys.shape
    rows = heads * pool.shape[4]
    _store(keys.numel(), keys.data_ptr(), values.data_ptr(), keys.stride(0), values.stride(0), num, heads, width,
           pool.data_ptr(), pool.numel() // width, slots.data_ptr(), layer * 2 * rows, rows)  # fmt: skip


# Sampling


@Kernel("scores num vocabulary uniform greedy tokens logprobs log_norm")
def _draw(args):
    a = carray(args, 1)[0]
    n = a.vocabulary
    scores, uniform = floats(a.scores, a.num, n), doubles(a.uniform, 1, a.num)
    greedy, tokens = integers(a.greedy, 1, a.num), integers(a.tokens, 1, a.num)
    logprobs, log_norm = floats(a.logprobs, 1, a.num), floats(a.log_norm, 1, a.num)
    weights, spans = np.empty(n, np.float32), np.empty((n + _SPAN - 1) // _SPAN, np.float64)
    while True:
        row = next_task(args)
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
    """Of each row of `scores` `[B, V]`: the first token at which the cumulative softmax exceeds `uniform` `[B]`
    (float64), or the likeliest where `greedy` `[B]` (int64) is not 0; its log-probability; the logarithm of the row's
    sum of exponentials."""
    num, vocabulary = scores.shape
    tokens, logprobs, log_norm = uniform.new_empty(num, dtype=torch.int64), scores.new_empty(num), scores.new_empty(num)
    _draw(scores.numel(), scores.data_ptr(), num, vocabulary, uniform.data_ptr(), greedy.data_ptr(), tokens.data_ptr(),
          logprobs.data_ptr(), log_norm.data_ptr())  # fmt: skip
    return tokens, logprobs, log_norm


# What stands between the matrix products


@Kernel("x out weight num width epsilon")
def _rms_norm(args):
    a = carray(args, 1)[0]
    x, out, weight = floats(a.x, a.num, a.width), floats(a.out, a.num, a.width), floats(a.weight, 1, a.width)[0]
    while True:
        first = next_task(args) * _ROWS
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


@Kernel("x stride num heads width cos sin weight epsilon")
def _rotate(args):
    a = carray(args, 1)[0]
    width, half, normalised = a.width, a.width // 2, a.weight != 0
    x, weight = floats(a.x, a.num, a.stride), floats(a.weight, 1, width)[0]
    cos, sin = floats(a.cos, a.num, half), floats(a.sin, a.num, half)
    while True:
        first = next_task(args) * _ROWS
        if first >= a.num:
            break
        for token in range(first, min(a.num, first + _ROWS)):
            for at in range(0, a.heads * width, width):
                if normalised:
                    squares = float32(0)
                    for i in range(at, at + width):
                        squares += x[token, i] * x[token, i]
                    scale = float32(1) / np.sqrt(squares / float32(width) + a.epsilon)
                    for i in range(width):
                        x[token, at + i] *= scale * weight[i]
                for i in range(half):
                    left, right = x[token, at + i], x[token, at + half + i]
                    x[token, at + i] = left * cos[token, i] - right * sin[token, i]
                    x[token, at + half + i] = right * cos[token, i] + left * sin[token, i]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """In place: `rms_norm` of each head of `x` `[T, heads, D]` if there is a weight, then its rotation by the angles
    whose `cos` and `sin` `[T, D / 2]` are given. A token's heads must lie together."""
    num, heads, width = x.shape
    _rotate(x.numel(), x.data_ptr(), x.stride(0), num, heads, width, cos.data_ptr(), sin.data_ptr(),
            0 if weight is None else weight.data_ptr(), epsilon)  # fmt: skip


@Kernel("gate up stride out num width")
def _silu_product(args):
    a = carray(args, 1)[0]
    width = a.width
    gate, up, out = floats(a.gate, a.num, a.stride), floats(a.up, a.num, a.stride), floats(a.out, a.num, width)
    below = np.empty(width, np.float32)
    while True:
        first = next_task(args) * _ROWS
        if first >= a.num:
            break
        for row in range(first, min(a.num, first + _ROWS)):
            for i in range(width):
                below[i] = -abs(gate[row, i])
            _exponentials(below)
            for i in range(width):
                # exp of numbers of at most 0 only: sigmoid(x) is 1 / (1 + e) above zero and e / (1 + e) below.
                e = below[i]
                out[row, i] = gate[row, i] * up[row, i] * (float32(1) if gate[row, i] >= 0 else e) / (float32(1) + e)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both `[T, D]`, rows equally far apart, or contiguous `[..., D]`."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    width = gate.shape[-1]
    _silu_product(gate.numel(), gate.data_ptr(), up.data_ptr(), gate.stride(-2), out.data_ptr(), gate.numel() // width,
                  width)  # fmt: skip
    return out
