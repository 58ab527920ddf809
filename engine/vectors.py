"""Vectors that stay in registers: what kernels say in LLVM's own terms, where a loop would not become as good."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"
from __future__ import annotations

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import float32, njit
from numba.core import cgutils

from thornback.engine.compiled import OPTIONS

WIDE = get_host_cpu_features().get("avx512f", False)
LANES = 16 if WIDE else 8  # floats in a vector register
# exp(x) is 2**n * 2**f; a polynomial gives 2**f for f in [0, 1) to 1e-7.
_LOG2_E, _LEAST = 1.4426950408889634, -126.0
LEAST = _LEAST / _LOG2_E  # the least number whose exp is not taken for that of this one
_POWER_OF_TWO = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)
_FACTORS = tuple(np.float32(factor) for factor in _POWER_OF_TWO)


def load(builder, kind, address, offset):
    """A number or a vector from `offset` bytes behind an address."""
    place = builder.add(address, ir.IntType(64)(offset))
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=4)


def splat(builder, kind, address, offset):
    """A vector of which every number is the one at that place."""
    return spread(builder, kind, load(builder, kind.element, address, offset))


def spread(builder, kind, number):
    """A vector of which every number is that one."""
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None))


def store(builder, value, address, offset):
    place = builder.add(address, ir.IntType(64)(offset))
    builder.store(value, builder.inttoptr(place, value.type.as_pointer()), align=4)


def multiply_add(builder, a, b, c):
    """a * b + c of vectors, rounded once."""
    if a.type.count == 1:
        return builder.fadd(builder.fmul(a, b), c)
    return _vector_function(builder, "fma", a, b, c)


def add_lanes(builder, a, b, distance):
    """Sums of lanes at a distance, a power of two: those of `a` in the lanes whose number lacks that bit, and those of
    `b` in the others."""
    lanes = range(a.type.count)
    kind = ir.VectorType(ir.IntType(32), a.type.count)
    here = ir.Constant(kind, [i + a.type.count * (i & distance > 0) for i in lanes])
    there = ir.Constant(kind, [(i ^ distance) + a.type.count * (i & distance > 0) for i in lanes])
    return builder.fadd(builder.shuffle_vector(a, b, here), builder.shuffle_vector(a, b, there))


def across(builder, x, combine):
    """What all numbers of a vector are together."""
    distance = x.type.count // 2
    while distance:
        other = ir.Constant(ir.VectorType(ir.IntType(32), x.type.count), [i ^ distance for i in range(x.type.count)])
        x = combine(builder, x, builder.shuffle_vector(x, x, other))
        distance //= 2
    return builder.extract_element(x, ir.IntType(32)(0))


def higher(builder, a, b):
    """The higher number of each lane."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _vector_function(builder, name, *args):
    kind = ir.FunctionType(args[0].type, [arg.type for arg in args])
    name = f"llvm.{name}.v{args[0].type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def exponential(builder, x):
    """exp of a vector of numbers of at most 0."""

    def constant(value):
        return ir.Constant(x.type, [value] * x.type.count)

    z = _vector_function(builder, "maxnum", builder.fmul(x, constant(_LOG2_E)), constant(_LEAST))
    n = _vector_function(builder, "floor", z)
    f, p = builder.fsub(z, n), constant(_POWER_OF_TWO[0])
    for factor in _POWER_OF_TWO[1:]:
        p = multiply_add(builder, p, f, constant(factor))
    bits = ir.VectorType(ir.IntType(32), x.type.count)
    power = builder.shl(builder.fptosi(n, bits), ir.Constant(bits, [23] * x.type.count))
    return builder.bitcast(builder.add(builder.bitcast(p, bits), power), x.type)


@njit(inline="always", **OPTIONS)
def exponentials(x):
    """exp of numbers of at most 0, in place, in a form that becomes vector instructions."""
    bits = x.view(np.int32)
    for t in range(len(x)):
        z = max(x[t] * float32(_LOG2_E), float32(_LEAST))
        n = np.floor(z)
        f, p = z - n, _FACTORS[0]
        p = p * f + _FACTORS[1]
        p = p * f + _FACTORS[2]
        p = p * f + _FACTORS[3]
        p = p * f + _FACTORS[4]
        p = p * f + _FACTORS[5]
        x[t] = p
        bits[t] += np.int32(n) << np.int32(23)
