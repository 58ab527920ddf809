"""The steps of attention over a block of keys and values, in vectors: what `paged_attention` is made of."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from thornback.engine.vectors import (
    LANES,
    LEAST,
    across,
    add_lanes,
    exponential,
    higher,
    load,
    multiply_add,
    splat,
    spread,
    store,
)

_SUMS = 24  # vectors that fit into registers


def lanes_of(width: int) -> int:
    """How many numbers of a row a vector holds: a power of two that divides the row."""
    return min(LANES, width & -width)


@intrinsic(prefer_literal=True)
def products(context, queries, keys, last, out, rows, width, stride):
    """Products of some rows of `queries` with as many keys as a vector has lanes, in `keys` one after the other, into
    rows of `out` that lie `stride` numbers apart; those behind the last key are that again."""
    count, size, step = (literal.literal_value for literal in (rows, width, stride))
    lanes = lanes_of(size)

    def generate(context, builder, signature, args):
        queries, keys, last, out = args[:4]
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
        parts = [
            [load(builder, vector, queries, (row * size + part) * 4) for part in range(0, size, lanes)]
            for row in range(count)
        ]

        def sums(first, number):
            """A vector for each row: the lanes that leave the same rest add up to the product with key first + rest."""
            if number > 1:
                half = number // 2
                pairs = zip(sums(first, half), sums(first + half, half), strict=True)
                return [add_lanes(builder, a, b, half) for a, b in pairs]
            real = builder.select(builder.icmp_signed("<", i64(first), last), i64(first), last)
            key = builder.add(keys, builder.mul(real, i64(size * 4)))
            totals = [None] * count
            for i in range(size // lanes):
                some = load(builder, vector, key, i * lanes * 4)
                for row, total in enumerate(totals):
                    mine = parts[row][i]
                    totals[row] = multiply_add(builder, mine, some, total) if i else builder.fmul(mine, some)
            return totals

        for row, result in enumerate(sums(0, lanes)):
            store(builder, result, out, row * step * 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, rows, width, stride), generate


@intrinsic
def hide(context, scores, seen):
    """Make of `LANES` scores those minus infinity whose bit is not set in `seen`."""

    def generate(context, builder, signature, args):
        scores, seen = args
        vector = ir.VectorType(ir.FloatType(), LANES)
        bits = builder.bitcast(builder.trunc(seen, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
        nothing = ir.Constant(vector, [-np.inf] * LANES)
        store(builder, builder.select(bits, load(builder, vector, scores, 0), nothing), scores, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def highest(context, scores, num):
    """The highest of `num` numbers, a multiple of `LANES`."""

    def generate(context, builder, signature, args):
        scores, num = args
        vector = ir.VectorType(ir.FloatType(), LANES)
        best = cgutils.alloca_once_value(builder, ir.Constant(vector, [-np.inf] * LANES))
        with cgutils.for_range_slice(builder, num.type(0), num, num.type(LANES)) as (t, _):
            here = builder.add(scores, builder.mul(t, num.type(4)))
            builder.store(higher(builder, load(builder, vector, here, 0), builder.load(best)), best)
        return across(builder, builder.load(best), higher)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def weigh(context, scores, num, top):
    """Make of `num` scores, a multiple of `LANES`, their exponentials over that of `top`; returns the sum. Of hidden
    ones, and of those that are as good as nothing, it makes 0."""

    def generate(context, builder, signature, args):
        scores, num, top = args
        vector = ir.VectorType(ir.FloatType(), LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, None))
        tops, least = spread(builder, vector, top), ir.Constant(vector, [LEAST] * LANES)
        with cgutils.for_range_slice(builder, num.type(0), num, num.type(LANES)) as (t, _):
            here = builder.add(scores, builder.mul(t, num.type(4)))
            x = builder.fsub(load(builder, vector, here, 0), tops)
            some = builder.fcmp_ordered(">=", x, least)  # not so if both were minus infinity
            weights = builder.select(some, exponential(builder, x), ir.Constant(vector, None))
            store(builder, weights, here, 0)
            builder.store(builder.fadd(builder.load(total), weights), total)
        return across(builder, builder.load(total), lambda builder, a, b: builder.fadd(a, b))

    return types.float32(types.int64, types.int64, types.float32), generate


@intrinsic(prefer_literal=True)
def add_values(context, weights, values, start, stop, sums, rows, width, stride):
    """Add the rows `start` to `stop - 1` of `values` to each of some rows of `sums`, by its own weights, which lie
    `stride` numbers behind those of the row before."""
    count, size, step = (literal.literal_value for literal in (rows, width, stride))
    lanes = lanes_of(size)

    def generate(context, builder, signature, args):
        weights, values, start, stop, sums = args[:5]
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), lanes)
        together = max(1, min(count, _SUMS * lanes // size))
        places = [(row, part) for row in range(count) for part in range(0, size, lanes)]
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

    return types.void(*[types.int64] * 5, rows, width, stride), generate
