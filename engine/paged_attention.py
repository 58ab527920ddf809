"""Attention over the paged pool as it lies, block by block: float32 on CPU, without gradients."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, var-annotated"
from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numba import carray, njit
from torch import Tensor

from thornback.engine.attention_steps import add_values, hide, highest, lanes_of, products, weigh
from thornback.engine.compiled import OPTIONS, Compiled, Kernel, fetch, floats, hold, integers, next_task
from thornback.engine.vectors import LANES

NO_WINDOW = 1 << 40
_NEIGHBOURS = 8  # tokens whose attention one thread computes at a time: a block they share is read once
_AHEAD = 4096  # bytes of the next block that are asked for while one is worked on
_SPAN = 256  # keys whose scores it keeps at a time: with the queries and a block they fit into the nearest cache


@dataclass(slots=True)
class PagedTokens:
    """Tokens whose attention reads the pool as it lies; all int64. `tokens` `[n]`: their places among the packed ones;
    `owners` `[n]`: the row of `tables` `[B, N]` that holds a token's blocks; `lengths` `[n]`: how many keys it sees,
    but of those from `bases` `[n]` on only the ones whose bit is set in `bits` `[n]`."""

    tokens: Tensor
    owners: Tensor
    lengths: Tensor
    bases: Tensor
    bits: Tensor
    tables: Tensor


@njit(**OPTIONS)
def _seen(start, stop, base, bits):
    """Of the keys from 0 on, of which a token sees those from `start` to `stop - 1`, but from `base` on only the ones
    whose bit is set in `bits`: those it sees, as bits, of which `LANES` count."""
    seen = -1 << max(0, min(start, 63))
    if stop < LANES:
        seen &= (1 << max(0, stop)) - 1
    if base <= 0:
        seen &= bits >> min(-base, 63)
    elif base < LANES:
        seen &= bits << base | (1 << base) - 1
    return seen


@functools.cache
def attention_kernel(heads: int, kv_heads: int, width: int, size: int) -> Compiled:
    """Compiled for one shape of heads and blocks: what is constant stays in registers.

    A task is one head of keys for some neighbouring tokens. It takes their contexts span by span: first all scores of
    a span, a block's keys once for all the tokens that see it; then each token's softmax over the span; then the values
    by their weights. Where spans and vectors begin is a matter of places in a context, and what a token does not see
    weighs 0: its result is the same, to the last bit, whatever tokens stand beside it.
    """
    group, lanes = heads // kv_heads, lanes_of(width)
    most, side = _NEIGHBOURS * group, kv_heads * size * width * 4
    span = max(1, _SPAN // size) * size
    room = -(-span // LANES) * LANES + LANES  # a block's last scores are a vector, too

    @njit(**OPTIONS)
    def ask(address):
        """Ask for a block's keys or values: pages of memory are no neighbours, so that the CPU would not by itself."""
        for line in range(0, min(size * width * 4, _AHEAD), 64):
            fetch(address + line)

    @njit(**OPTIONS)
    def score(queries, num, keys, start, stop, out):
        """Products of `num` queries with a block's keys `start` to `stop - 1`, and some more."""
        for t in range(start // lanes * lanes, stop, lanes):
            last, row = size - 1 - t, 0
            while row < num:
                at, to = queries + row * width * 4, out + (row * room + t) * 4
                if num - row > 1:
                    products(at, keys + t * width * 4, last, to, 2, width, room)
                else:
                    products(at, keys + t * width * 4, last, to, 1, width, room)
                row += 2

    @njit(**OPTIONS)
    def collect(weights, num, values, start, stop, sums):
        """Add a block's values to `num` rows of sums."""
        row = 0
        while row < num:
            at, to = weights + row * room * 4, sums + row * width * 4
            if num - row >= 4:
                add_values(at, values, start, stop, to, 4, width, room)
                row += 4
            elif num - row >= 2:
                add_values(at, values, start, stop, to, 2, width, room)
                row += 2
            else:
                add_values(at, values, start, stop, to, 1, width, room)
                row += 1

    @Kernel(
        "query query_stride out num_tokens pool pool_rows layer_row block_rows "
        "num tokens owners lengths bases bits tables num_tables max_blocks window scaling"
    )
    def attend(args):
        a = carray(args, 1)[0]
        num, window, scaling = a.num, a.window, a.scaling
        out, tables = floats(a.out, a.num_tokens, heads * width), integers(a.tables, a.num_tables, a.max_blocks)
        tokens, owners = integers(a.tokens, 1, num)[0], integers(a.owners, 1, num)[0]
        lengths, bases = integers(a.lengths, 1, num)[0], integers(a.bases, 1, num)[0]
        bits = integers(a.bits, 1, num)[0]
        peak, total = np.empty(most, np.float32), np.empty(most, np.float32)
        queries, sums = np.empty((most, width), np.float32), np.empty((most, width), np.float32)
        scores = np.empty((most, room), np.float32)
        runs = np.empty((span // size * _NEIGHBOURS, 6), np.int64)
        to_queries, to_sums, to_scores = queries.ctypes.data, sums.ctypes.data, scores.ctypes.data
        while True:
            task = next_task(args)
            first, head = task // kv_heads * _NEIGHBOURS, task % kv_heads
            if first >= num:
                break
            last = min(first + _NEIGHBOURS, num)
            peak[:], total[:], sums[:] = -np.inf, 0, 0
            longest = 0
            for s in range(first, last):
                longest = max(longest, lengths[s])
                query = floats(a.query + (tokens[s] * a.query_stride + head * group * width) * 4, group, width)
                for g in range(group):
                    for i in range(width):
                        queries[(s - first) * group + g, i] = query[g, i] * scaling
            pool = a.pool + (a.layer_row + head * size) * width * 4
            for base in range(0, longest, span):
                # Runs of neighbours that see the same block.
                num_runs = 0
                for place in range(0, min(span, longest - base), size):
                    before = -1
                    for s in range(first, last):
                        start = max(0, lengths[s] - window - base - place)
                        stop = min(size, lengths[s] - base - place)
                        if start >= stop:
                            before = -1
                            continue
                        block = tables[owners[s], (base + place) // size]
                        if block == before:
                            run = runs[num_runs - 1]
                            run[2], run[3], run[4] = s + 1, min(run[3], start), max(run[4], stop)
                        else:
                            run = runs[num_runs]
                            run[0], run[1], run[2], run[3], run[4] = place, s, s + 1, start, stop
                            run[5] = pool + block * a.block_rows * width * 4
                            num_runs += 1
                            before = block
                for i in range(num_runs):
                    place, left, right, start, stop, keys = runs[i]
                    row, rows = (left - first) * group, (right - left) * group
                    to = to_scores + (row * room + place) * 4
                    ask(runs[i + 1, 5] if i + 1 < num_runs else runs[0, 5] + side)
                    score(to_queries + row * width * 4, rows, keys, start, stop, to)
                for s in range(first, last):
                    start, stop = max(0, lengths[s] - window - base), min(span, lengths[s] - base)
                    if start >= stop:
                        continue
                    low, high = start // size * size // LANES * LANES, -(-stop // size) * size
                    num_scores = -(-(high - low) // LANES) * LANES
                    clear, t = min(stop, bases[s] - base), low
                    while t < high:
                        if start <= t and t + LANES <= clear:
                            t = clear // LANES * LANES
                            continue
                        seen = _seen(start - t, stop - t, bases[s] - base - t, bits[s])
                        for row in range((s - first) * group, (s - first + 1) * group):
                            hide(to_scores + (row * room + t) * 4, seen)
                        t += LANES
                    for row in range((s - first) * group, (s - first + 1) * group):
                        at = to_scores + (row * room + low) * 4
                        before = peak[row]
                        top = max(before, highest(at, num_scores))
                        weight = weigh(at, num_scores, top)
                        if top > before:
                            shrink = np.exp(before - top)
                            peak[row] = top
                            total[row] *= shrink
                            for i in range(width):
                                sums[row, i] *= shrink
                        total[row] += weight
                for i in range(num_runs):
                    place, left, right, start, stop, keys = runs[i]
                    row, rows = (left - first) * group, (right - left) * group
                    weights = to_scores + (row * room + place) * 4
                    if i + 1 < num_runs:
                        ask(runs[i + 1, 5] + side)
                    collect(weights, rows, keys + side, start, stop, to_sums + row * width * 4)
            for s in range(first, last):
                for g in range(group):
                    row, column = (s - first) * group + g, (head * group + g) * width
                    for i in range(width):
                        out[tokens[s], column + i] = sums[row, i] / total[row]
        hold(queries)
        hold(sums)
        hold(scores)

    return attend


def paged_attention(
    query: Tensor, pool: Tensor, layer: int, at: PagedTokens, window: int | None, scaling: float, out: Tensor
) -> None:
    """Attention of some of a pass's tokens over the pool `[blocks, layers, 2, kv_heads, block_size, D]`.

    `query` and `out` `[T, heads, D]`, of which rows `at.tokens` are read and written.
    """
    num_tokens, heads, width = query.shape
    if query.stride(2) != 1 or query.stride(1) != width:  # tokens may lie apart, their heads may not
        query = query.contiguous()
    _, layers, _, kv_heads, block_size, _ = pool.shape
    rows = 2 * kv_heads * block_size
    attention_kernel(heads, kv_heads, width, block_size)(
        len(at.tokens) * at.tables.shape[1] * block_size * width,
        query.data_ptr(), query.stride(0), out.data_ptr(), num_tokens,
        pool.data_ptr(), pool.numel() // width, layer * rows, layers * rows,
        len(at.tokens), at.tokens.data_ptr(), at.owners.data_ptr(), at.lengths.data_ptr(), at.bases.data_ptr(),
        at.bits.data_ptr(), at.tables.data_ptr(), *at.tables.shape, window or NO_WINDOW, scaling,
    )  # fmt: skip
