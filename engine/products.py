"""Matrix products with packed weights, for float32 on CPU: the one place where a forward pass does arithmetic.

A weight `[O, I]` is kept as panels of `WIDTH` outputs, `[O / WIDTH, 1 + I, WIDTH]`: a bias, then one row an input. A
tile of `_ROWS` tokens by `WIDTH` outputs stays in vector registers while it runs down a panel.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, call-arg, var-annotated"
from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import carray, float32, types
from numba.extending import intrinsic
from torch import Tensor, nn
from torch.nn.functional import pad

from thornback.engine.compiled import Kernel, floats, hold, next_task
from thornback.engine.vectors import LANES, WIDE, exponential, load, multiply_add, splat, store

_ROWS = 8 if WIDE else 4  # of a tile: twice as many vector registers hold it, and there are 32 or 16
WIDTH = 2 * LANES
_GROUP = 128  # rows that a task takes at most: their inputs stay in the core's own cache
STORE, ADD, SILU_PRODUCT = 0, 1, 2  # what becomes of a tile


@intrinsic
def _multiply(context, x, stride, last, panel, depth, then, out, out_stride, spare):
    """Rows 0 to `last` of `x` times a panel of `depth` inputs, and on to the rows of `out`; strides are in bytes.
    The rows that a tile has besides are the last one again, and go to `spare`."""

    def generate(context, builder, signature, args):
        x, stride, last, panel, depth, then, out, out_stride, spare = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
        halves = (0, LANES * 4)
        rows, places = [], []
        for row in range(_ROWS):
            inside = builder.icmp_signed("<=", i64(row), last)
            rows.append(builder.add(x, builder.mul(builder.select(inside, i64(row), last), stride)))
            place = builder.add(out, builder.mul(i64(row), out_stride))
            places.append(builder.select(inside, place, spare))
        bias, before = [load(builder, vector, panel, half) for half in halves], builder.block
        loop, done = builder.append_basic_block("inputs"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sums = builder.phi(i64), [[builder.phi(vector) for _ in halves] for _ in rows]
        following = builder.add(k, i64(1))
        weights = builder.add(panel, builder.mul(following, i64(WIDTH * 4)))
        columns = [load(builder, vector, weights, half) for half in halves]
        results = []
        for row, totals in zip(rows, sums, strict=True):
            value = splat(builder, vector, builder.add(row, builder.mul(k, i64(4))), 0)
            results.append([multiply_add(builder, value, c, t) for c, t in zip(columns, totals, strict=True)])
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
        k.add_incoming(i64(0), before)
        k.add_incoming(following, loop)
        for totals, result in zip(sums, results, strict=True):
            for total, first, sum_ in zip(totals, bias, result, strict=True):
                total.add_incoming(first, before)
                total.add_incoming(sum_, loop)
        builder.position_at_end(done)
        with builder.if_else(builder.icmp_signed("==", then, i64(SILU_PRODUCT))) as (product, otherwise):
            with product:
                for place, (gate, up) in zip(places, results, strict=True):
                    store(builder, builder.fmul(_silu(builder, gate), up), place, 0)
            with otherwise, builder.if_else(builder.icmp_signed("==", then, i64(ADD))) as (addition, plain):
                with addition:
                    for place, result in zip(places, results, strict=True):
                        for half, sum_ in zip(halves, result, strict=True):
                            store(builder, builder.fadd(load(builder, vector, place, half), sum_), place, half)
                with plain:
                    for place, result in zip(places, results, strict=True):
                        for half, sum_ in zip(halves, result, strict=True):
                            store(builder, sum_, place, half)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


def _silu(builder, x):
    """x * sigmoid(x), by exp of numbers of at most 0: 1 / (1 + e) above zero, e / (1 + e) below."""
    zero, one = (ir.Constant(x.type, [value] * x.type.count) for value in (0.0, 1.0))
    above = builder.fcmp_ordered(">=", x, zero)
    e = exponential(builder, builder.select(above, builder.fneg(x), x))
    return builder.fdiv(builder.fmul(x, builder.select(above, one, e)), builder.fadd(one, e))


@Kernel("x x_stride weights out out_stride num depth outputs group then")
def product(args):
    a = carray(args, 1)[0]
    panels, then, out = (a.outputs + WIDTH - 1) // WIDTH, a.then, floats(a.out, a.num, a.out_stride)
    stride, out_stride, depth = a.x_stride * 4, a.out_stride * 4, a.depth
    tile, spare = np.empty((_ROWS, WIDTH), np.float32), np.empty(WIDTH, np.float32)
    to_tile, to_spare = tile.ctypes.data, spare.ctypes.data
    while True:
        task = next_task(args)
        panel, start = task % panels, task // panels * a.group
        if start >= a.num:
            break
        stop, column = min(a.num, start + a.group), panel * WIDTH
        to, width = column // 2 if then == SILU_PRODUCT else column, min(WIDTH, a.outputs - column)
        weights = a.weights + panel * (1 + depth) * WIDTH * 4
        for first in range(start, stop, _ROWS):
            x, last = a.x + first * stride, min(_ROWS, stop - first) - 1
            if width == WIDTH:
                at = a.out + first * out_stride + to * 4
                _multiply(x, stride, last, weights, depth, then, at, out_stride, to_spare)
                continue
            # The last panel has more columns than are left: it goes through a tile of its own.
            _multiply(x, stride, last, weights, depth, STORE, to_tile, WIDTH * 4, to_spare)
            for row in range(last + 1):
                for i in range(width):
                    before = out[first + row, column + i] if then == ADD else float32(0)
                    out[first + row, column + i] = before + tile[row, i]
    hold(tile)
    hold(spare)


def rows_per_task(num: int, outputs: int) -> int:
    """So many of `num` rows that there are several tasks for each thread, and a panel serves as many as it can."""
    tiles = num * outputs // WIDTH // (4 * torch.get_num_threads() * _ROWS)
    return min(max(tiles, 1) * _ROWS, _GROUP)


class Packed:
    """The weights of layers that share their input, in panels: one after the other, or `LANES` outputs of a gate and
    of what it lets through in turn, as a `SILU_PRODUCT` wants them."""

    def __init__(self, *layers: nn.Linear, interleave: bool = False) -> None:
        self._layers, self._interleave = layers, interleave
        self.depth, self.outputs = layers[0].in_features, sum(layer.out_features for layer in layers)
        self.panels = torch.zeros(-(-self.outputs // WIDTH), 1 + self.depth, WIDTH)

    def load(self) -> None:
        """Take over the layers' weights as they are now."""
        with torch.inference_mode():
            self.panels[:, 1:] = self._panels([layer.weight for layer in self._layers]).transpose(1, 2)
            if self._layers[0].bias is not None:
                self.panels[:, 0] = self._panels([layer.bias[:, None] for layer in self._layers])[..., 0]

    def _panels(self, parts: list[Tensor]) -> Tensor:
        """`[panels, WIDTH, I]`."""
        if self._interleave:
            rows = torch.stack([part.view(-1, LANES, part.shape[1]) for part in parts], 1).flatten(0, 2)
        else:
            rows = torch.cat(parts)
        return pad(rows, (0, 0, 0, len(self.panels) * WIDTH - self.outputs)).view(-1, WIDTH, rows.shape[1])
