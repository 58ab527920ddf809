"""Attention over the paged pool as it lies, block by block: float32 on CPU, without gradients."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, var-annotated"
from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import carray, float32, types
from numba.extending import intrinsic
from torch import Tensor

from thornback.engine.compiled import Compiled, Kernel, fetch, floats, integers, next_task
from thornback.engine.vectors import LANES, exponentials, load, multiply_add, splat, store

NO_WINDOW = 1 << 40
_NEIGHBOURS = 8  # tokens whose attention one thread computes block by block: a block they share is read once
_SUMS = 24  # vectors that fit into registers


def _lanes(width: int) -> int:
    """How many numbers of a row a vector holds: a power of two that divides the row."""
    return min(LANES, width & -width)


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


@intrinsic(prefer_literal=True)
def _products(context, query, keys, last, out, width):
    """Products of one query with as many keys as a vector has lanes, in `keys` one after the other; those behind the
    last are that again."""
    size = width.literal_value
    lanes = _lanes(size)

    def generate(context, builder, signature, args):
        query, keys, last, out, _ = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
        parts = [load(builder, vector, query, part * 4) for part in range(0, size, lanes)]
        sums = []
        for number in range(lanes):
            real = builder.select(builder.icmp_signed("<", i64(number), last), i64(number), last)
            key = builder.add(keys, builder.mul(real, i64(size * 4)))
            total = ir.Constant(vector, None)
            for i, part in enumerate(parts):
                total = multiply_add(builder, part, load(builder, vector, key, i * lanes * 4), total)
            sums.append(total)
        # Each step adds the halves of all vectors and packs two results into one, until a lane is a key.
        segment = lanes
        while segment > 1:
            low = [start + i for start in range(0, 2 * lanes, segment) for i in range(segment // 2)]
            pick = [
                ir.Constant(ir.VectorType(ir.IntType(32), lanes), [i + half for i in low]) for half in (0, segment // 2)
            ]
            sums = [
                builder.fadd(*(builder.shuffle_vector(a, b, p) for p in pick))
                for a, b in zip(sums[::2], sums[1::2], strict=True)
            ]
            segment //= 2
        store(builder, sums[0], out, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, width), generate


@intrinsic(prefer_literal=True)
def _add_values(context, weights, values, start, stop, sums, width, group, stride):
    """Add the rows `start` to `stop - 1` of `values` to each row of `sums` `[group, width]`, by its own weights."""
    size, rows, step = (literal.literal_value for literal in (width, group, stride))
    lanes = _lanes(size)

    def generate(context, builder, signature, args):
        weights, values, start, stop, sums = args[:5]
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
        together = max(1, min(rows, _SUMS * lanes // size))
        places = [(row, part) for row in range(rows) for part in range(0, size, lanes)]
        for some in (places[i : i + together * size // lanes] for i in range(0, len(places), together * size // lanes)):
            before = builder.block
            loop, done = builder.append_basic_block("tokens"), builder.append_basic_block("done")
            initial = [load(builder, vector, sums, (row * size + part) * 4) for row, part in some]
            builder.branch(loop)
            builder.position_at_end(loop)
            t, totals = builder.phi(i64), [builder.phi(vector) for _ in some]
            value = builder.add(values, builder.mul(t, i64(size * 4)))
            weight = builder.add(weights, builder.mul(t, i64(4)))
            parts = {part: load(builder, vector, value, part * 4) for part in {part for _, part in some}}
            factors = {row: splat(builder, vector, weight, row * step * 4) for row in {row for row, _ in some}}
            results = [
                multiply_add(builder, factors[row], parts[part], total)
                for (row, part), total in zip(some, totals, strict=True)
            ]
            following = builder.add(t, i64(1))
            builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
            t.add_incoming(start, before)
            t.add_incoming(following, loop)
            for total, first, result in zip(totals, initial, results, strict=True):
                total.add_incoming(first, before)
                total.add_incoming(result, loop)
            builder.position_at_end(done)
            for (row, part), result in zip(some, results, strict=True):
                store(builder, result, sums, (row * size + part) * 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, width, group, stride), generate


@functools.cache
def attention_kernel(heads: int, kv_heads: int, width: int, size: int) -> Compiled:
    """Compiled for one shape of heads and blocks: what is constant stays in registers."""
    group, lanes = heads // kv_heads, _lanes(width)
    room = -(-size // lanes) * lanes

    @Kernel(
        "query query_stride out num_tokens pool pool_rows layer_row block_rows "
        "num tokens owners lengths bases bits tables num_tables max_blocks window scaling"
    )
    def attend(args):
        a = carray(args, 1)[0]
        num, window, scaling, block_rows, layer_row = a.num, a.window, a.scaling, a.block_rows, a.layer_row
        out, tables = floats(a.out, a.num_tokens, heads * width), integers(a.tables, a.num_tables, a.max_blocks)
        tokens, owners, lengths = integers(a.tokens, 1, num), integers(a.owners, 1, num), integers(a.lengths, 1, num)
        bases, bits = integers(a.bases, 1, num), integers(a.bits, 1, num)
        peak = np.empty(_NEIGHBOURS * group, np.float32)
        total = np.empty(_NEIGHBOURS * group, np.float32)
        sums = np.empty((_NEIGHBOURS * group, width), np.float32)
        scores = np.empty((group, room), np.float32)
        to_sums, to_scores = sums.ctypes.data, scores.ctypes.data
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
                    row = layer_row + head * size
                    keys = a.pool + (tables[owners[0, s], j] * block_rows + row) * width * 4
                    values = keys + kv_heads * size * width * 4
                    if stop == size and lengths[0, s] > (j + 1) * size:
                        ahead = tables[owners[0, s], j + 1]
                        if s == first or ahead != tables[owners[0, s - 1], j + 1]:
                            at = a.pool + (ahead * block_rows + row) * width * 4
                            for line in range(0, size * width * 4, 64):
                                fetch(at + line)
                                fetch(at + kv_heads * size * width * 4 + line)
                    query = a.query + (tokens[0, s] * a.query_stride + head * group * width) * 4
                    for g in range(group):
                        of = scores[g]
                        for t in range(start // lanes * lanes, stop, lanes):
                            to = to_scores + (g * room + t) * 4
                            _products(query + g * width * 4, keys + t * width * 4, size - 1 - t, to, width)
                        if start > 0 or stop < room:
                            for t in range(room):
                                if t < start or t >= stop:
                                    of[t] = -np.inf
                        guessed = bases[0, s] - j * size
                        for t in range(max(start, guessed), stop):
                            if not bits[0, s] >> (t - guessed) & 1:
                                of[t] = -np.inf
                        row = (s - first) * group + g
                        before = peak[row]
                        top = before
                        for t in range(room):
                            top = max(top, of[t] * scaling)
                        for t in range(room):
                            of[t] = of[t] * scaling - top
                        exponentials(of)
                        weight = float32(0)
                        for t in range(room):
                            weight += of[t]
                        if top > before:
                            shrink = np.exp(before - top)
                            peak[row] = top
                            total[row] *= shrink
                            for i in range(width):
                                sums[row, i] *= shrink
                        total[row] += weight
                    _add_values(
                        to_scores, values, start, stop, to_sums + (s - first) * group * width * 4, width, group, room
                    )
            for s in range(first, last):
                for g in range(group):
                    row, column = (s - first) * group + g, (head * group + g) * width
                    for i in range(width):
                        out[tokens[0, s], column + i] = sums[row, i] / total[row]

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
