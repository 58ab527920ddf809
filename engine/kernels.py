"""The parts of a forward pass that torch has no fast operator for, in float32 on CPU, without gradients."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, var-annotated"
from __future__ import annotations

import functools

import numpy as np
import torch
from numba import carray, float32, njit
from torch import Tensor

from thornback.engine.compiled import OPTIONS, Compiled, Kernel, doubles, floats, integers, next_task
from thornback.engine.vectors import exponentials

_ROWS = 16  # rows that a thread takes at a time
_SPAN = 64  # tokens whose weights are summed before a draw looks inside
_TINY = float32(1e-37)  # what `exponentials` makes of minus infinity is below


def usable(x: Tensor) -> bool:
    """Whether the kernels can work on tensors like `x`."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()


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
        exponentials(weights)
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


@Kernel("scores num vocabulary scale k tokens chances norm")
def find_likeliest(args):
    """See `likeliest`."""
    a = carray(args, 1)[0]
    n, k = a.vocabulary, a.k
    scores, scale, norm = floats(a.scores, a.num, n), floats(a.scale, 1, a.num), floats(a.norm, 1, a.num)
    tokens, chances = integers(a.tokens, a.num, k), floats(a.chances, a.num, k)
    weights = np.empty(n, np.float32)
    while True:
        row = next_task(args)
        if row >= a.num:
            break
        best, found = chances[row], tokens[row]
        best[:] = -np.inf
        found[:] = 0
        for i in range(n):
            score = scores[row, i]
            if score > best[k - 1]:
                at = k - 1
                while at > 0 and best[at - 1] < score:
                    best[at], found[at] = best[at - 1], found[at - 1]
                    at -= 1
                best[at], found[at] = score, i
        peak, factor = best[0], scale[0, row]
        for i in range(n):
            weights[i] = (scores[row, i] - peak) * factor
        exponentials(weights)
        total = 0.0
        for i in range(n):
            total += weights[i]
        norm[0, row] = peak * factor + np.log(total)
        for i in range(k):
            best[i] = np.exp((best[i] - peak) * factor) / total


def likeliest(scores: Tensor, scale: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of `scores` `[B, V]` the `k` likeliest tokens, int64 `[B, k]`; their probabilities under
    softmax(`scale` `[B]` * scores); and the logarithm of that softmax's denominator `[B]`."""
    num, vocabulary = scores.shape
    tokens, chances, norm = (
        scores.new_empty(num, k, dtype=torch.int64),
        scores.new_empty(num, k),
        scores.new_empty(num),
    )
    find_likeliest(scores.numel(), scores.data_ptr(), num, vocabulary, scale.data_ptr(), k, tokens.data_ptr(),
                   chances.data_ptr(), norm.data_ptr())  # fmt: skip
    return tokens, chances, norm


# What stands between the matrix products


@Kernel("table rows index out num width")
def gather(args):
    """`out[i] = table[index[i]]`."""
    a = carray(args, 1)[0]
    table, out, index = floats(a.table, a.rows, a.width), floats(a.out, a.num, a.width), integers(a.index, 1, a.num)
    while True:
        first = next_task(args) * _ROWS
        if first >= a.num:
            break
        for row in range(first, min(a.num, first + _ROWS)):
            for i in range(a.width):
                out[row, i] = table[index[0, row], i]


@Kernel("x out weight num width epsilon")
def rms_norm(args):
    """Rows over their root mean square, times a weight."""
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


@njit(inline="always", **OPTIONS)
def _rotate(x, at, width, cos, sin, norm, normalised, epsilon):
    """One head of one token, `x[at : at + width]`: normalised if its model does so, and rotated."""
    if normalised:
        squares = float32(0)
        for i in range(at, at + width):
            squares += x[i] * x[i]
        scale = float32(1) / np.sqrt(squares / float32(width) + epsilon)
        for i in range(width):
            x[at + i] *= scale * norm[i]
    for i in range(width // 2):
        left, right = x[at + i], x[at + width // 2 + i]
        x[at + i] = left * cos[i] - right * sin[i]
        x[at + width // 2 + i] = right * cos[i] + left * sin[i]


@functools.cache
def place_kernel(heads: int, kv_heads: int, width: int) -> Compiled:
    """Gives queries and keys their positions, and keys and values their places in the pool (`slots` as in
    `PagedBatch`). Compiled for one shape of heads."""

    @Kernel("qkv num cos sin num_positions positions q_norm k_norm epsilon pool pool_rows slots layer_row value_rows")
    def place(args):
        a = carray(args, 1)[0]
        qkv, positions = floats(a.qkv, a.num, (heads + 2 * kv_heads) * width), integers(a.positions, 1, a.num)
        cos, sin = floats(a.cos, a.num_positions, width // 2), floats(a.sin, a.num_positions, width // 2)
        pool, slots = floats(a.pool, a.pool_rows, width), integers(a.slots, a.num, kv_heads)
        q_norm, k_norm = floats(a.q_norm, 1, width)[0], floats(a.k_norm, 1, width)[0]
        normalised, epsilon = a.q_norm != 0, a.epsilon
        while True:
            first = next_task(args) * _ROWS
            if first >= a.num:
                break
            for token in range(first, min(a.num, first + _ROWS)):
                x, at = qkv[token], positions[0, token]
                for head in range(heads):
                    _rotate(x, head * width, width, cos[at], sin[at], q_norm, normalised, epsilon)
                for head in range(kv_heads):
                    key, value = (heads + head) * width, (heads + kv_heads + head) * width
                    _rotate(x, key, width, cos[at], sin[at], k_norm, normalised, epsilon)
                    slot = slots[token, head] + a.layer_row
                    for i in range(width):
                        pool[slot, i] = x[key + i]
                        pool[slot + a.value_rows, i] = x[value + i]

    return place
