"""Attention over the paged pool as it lies, in Triton: what `paged_attention` is on CPU, for GPUs.

A program takes a tile: neighbouring tokens of one sequence, such as the nodes of its draft tree, times the heads that
share a head of keys. So keys are read once a tile, and the rows of a tile fill the GPU's matrix units. Where tiles are
too few to fill the GPU, several programs take a share of a tile's keys each, and a second kernel merges what they found
(Flash-Decoding).
"""

# mypy: disable-error-code="no-untyped-def, misc"
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thornback.engine.device_tokens import DeviceTokens

_LOG2E = 1.4426950408889634  # exponentials are powers of two, which GPUs have an instruction for
_SHARE = 256  # keys below which a share is not worth a program and the merging
_MOST_SHARES = 32
_TILE_BYTES = 16 << 10  # of keys, and of values, that a program holds at a time; two of each fit on any GPU


@triton.jit
def _product(a, b, onto, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto, input_precision="ieee")


@triton.jit
def _read(
    q, peak, total, sums, start, stop, keys, values, table, block_stride, scaling, length, base, bits,
    D: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, TREE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows of `q` over keys `start` to `stop - 1`. Without `TREE` all rows see all of them."""
    d = tl.arange(0, q.shape[1])[None, :]
    for first in range(start, stop, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        block = tl.load(table + n // SIZE, mask=n < stop, other=0)
        at = (block * block_stride + n % SIZE * D)[:, None] + d
        there = (n < stop)[:, None] & (d < D)
        k = tl.load(keys + at, mask=there, other=0.0)
        v = tl.load(values + at, mask=there, other=0.0)
        scores = _product(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), WIDEN) * scaling
        n = n[None, :]
        if TREE:
            named = bits >> tl.minimum(tl.maximum(n - base, 0), 63)
            scores = tl.where((n < length) & ((n < base) | ((named & 1) != 0)), scores, float("-inf"))
        if WINDOW:
            scores = tl.where(n >= length - WINDOW, scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1))
        level = tl.where(top == float("-inf"), 0.0, top)  # a row may have seen nothing yet
        weights, shrink = tl.exp2(scores - level[:, None]), tl.exp2(peak - level)
        total = total * shrink + tl.sum(weights, 1)
        sums = _product(weights.to(v.dtype), v, sums * shrink[:, None], WIDEN)
        peak = top
    return peak, total, sums


@triton.jit(do_not_specialize=["num", "num_tiles", "max_blocks"])
def _attend(
    query, keys, values, out, norms, numbers, tiles, tables,
    num, num_tiles, max_blocks, block_stride, query_stride, head_stride, scaling,
    GROUP: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Grid: tiles, heads of keys, shares of the keys. Row m of a tile is head `m % GROUP` of token `m // GROUP`."""
    head, share = tl.program_id(1), tl.program_id(2)
    first, count = tl.load(tiles + tl.program_id(0)), tl.load(tiles + num_tiles + tl.program_id(0))
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    real, at = m // GROUP < count, numbers + first + m // GROUP
    token, owner = tl.load(at, mask=real, other=0), tl.load(numbers + num + first)
    length = tl.load(at + 2 * num, mask=real, other=0)
    base, bits = tl.load(at + 3 * num, mask=real, other=0), tl.load(at + 4 * num, mask=real, other=0)
    heads, of = tl.num_programs(1) * GROUP, head * GROUP + m % GROUP
    there = real[:, None] & (d < D)[None, :]
    q = tl.load(query + (token * query_stride + of * head_stride)[:, None] + d[None, :], mask=there, other=0.0)

    longest = tl.max(length, 0)
    start = longest * 0
    if WINDOW:
        start = tl.maximum(tl.min(tl.where(real, length, longest), 0) - WINDOW, 0) // BLOCK_N * BLOCK_N
    span = tl.cdiv(tl.cdiv(longest - start, tl.num_programs(2)), BLOCK_N) * BLOCK_N
    start += share * span
    stop = tl.minimum(longest, start + span)
    common = tl.min(tl.where(real, tl.minimum(length, base), longest), 0)  # up to here, all rows see all keys
    turn = tl.maximum(tl.minimum(common, stop) // BLOCK_N * BLOCK_N, start)
    start, turn, stop = start.to(tl.int32), turn.to(tl.int32), stop.to(tl.int32)

    keys, values = keys + head * SIZE * D, values + head * SIZE * D
    table, length, base, bits = tables + owner * max_blocks, length[:, None], base[:, None], bits[:, None]
    peak, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    peak, total, sums = _read(
        q, peak, total, sums, start, turn, keys, values, table, block_stride, scaling, length, base, bits,
        D, SIZE, WINDOW, BLOCK_N, False, WIDEN,
    )  # fmt: skip
    peak, total, sums = _read(
        q, peak, total, sums, turn, stop, keys, values, table, block_stride, scaling, length, base, bits,
        D, SIZE, WINDOW, BLOCK_N, True, WIDEN,
    )  # fmt: skip

    total = tl.where(total > 0, total, 1.0)  # a share may hold nothing that a row sees
    row = token
    if SPLIT:
        row = share * num.to(tl.int64) + first + m // GROUP
        tl.store(norms + row * heads + of, peak + tl.log2(total), mask=real)
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + ((row * heads + of) * D)[:, None] + d[None, :], result, mask=there)


@triton.jit(do_not_specialize=["num"])
def _merge(parts, norms, out, numbers, num, D: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr):
    """Grid: tokens, heads. `parts` `[SHARES, n, heads, D]` weigh as 2 ** `norms` `[SHARES, n, heads]`."""
    nth, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, d = (tl.arange(0, SHARES).to(tl.int64) * num + nth) * heads + head, tl.arange(0, WIDTH)
    norm = tl.load(norms + row)
    weights = tl.exp2(norm - tl.max(norm, 0))
    part = tl.load(parts + row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    result = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    token = tl.load(numbers + nth)
    tl.store(out + (token * heads + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def sizes(group: int, width: int, run: int, item: int) -> dict[str, Any]:
    """How large tiles are, and who works on one, for `group` heads of `width` numbers of `item` bytes that share keys,
    and runs of up to `run` tokens. What `_attend` takes as constants and options."""
    padded = max(16, _power_of_two(width))  # matrix units take powers of two, from 16 on
    most = 128 if padded <= 128 and item == 2 else 32 if item == 4 else 64  # sums stay in registers
    rows = max(16, min(most, _power_of_two(group * run)), _power_of_two(group))
    keys = max(16, min(64, _TILE_BYTES // (padded * item)))
    warps = 8 if item == 4 or rows * padded > 8192 else 4
    return {"WIDTH": padded, "BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": 2}


def paged_attention(
    query: Tensor, pool: Tensor, layer: int, at: DeviceTokens, window: int | None, scaling: float, out: Tensor,
    shares: int = 0,
) -> None:  # fmt: skip
    """Attention of some of a pass's tokens over the pool `[blocks, layers, 2, kv_heads, block_size, D]`.

    `query` and `out` `[T, heads, D]`, of which rows `at.numbers[0]` are read and written; float32, float16 or bfloat16,
    like the pool. `shares`: among how many programs a tile's keys are divided, a power of two (0: as many as fill the
    GPU).
    """
    _, heads, width = query.shape
    kv_heads, size, num = pool.shape[3], pool.shape[4], at.numbers.shape[1]
    group = heads // kv_heads
    if query.stride(2) != 1:  # tokens and heads may lie apart, a head's numbers may not
        query = query.contiguous()
    constants = sizes(group, width, at.run, query.element_size())
    tiles = at.tiles(constants["BLOCK_M"] // group)
    if not shares:
        free = 2 * _processors(pool.device) // (tiles.shape[1] * kv_heads)
        shares = max(1, min(free, min(at.longest, window or at.longest) // _SHARE, _MOST_SHARES))
        shares = 1 << shares.bit_length() - 1
    parts, norms = out, out  # not read where there is one share
    if shares > 1:
        parts = torch.empty((shares, num, heads, width), dtype=torch.float32, device=out.device)
        norms = torch.empty((shares, num, heads), dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(pool):  # Triton starts kernels on the current device
        _attend[tiles.shape[1], kv_heads, shares](
            query, pool[:, layer, 0], pool[:, layer, 1], parts, norms, at.numbers, tiles, at.tables,
            num, tiles.shape[1], at.tables.shape[1], pool.stride(0), query.stride(0), query.stride(1),
            scaling * _LOG2E, GROUP=group, D=width, SIZE=size, WINDOW=window or 0, SPLIT=shares > 1,
            WIDEN=query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret, **constants,
        )  # fmt: skip
        if shares > 1:
            _merge[num, heads](parts, norms, out, at.numbers, num, D=width, WIDTH=constants["WIDTH"], SHARES=shares)
