"""Passes of a draft over the levels of the trees that it grows: through its modules, or compiled.

The nodes stand behind each sequence, one behind the other, level by level; each sees its own ancestors only.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from thornback.algorithms import Level
from thornback.engine import kernels
from thornback.engine.attention import PagedBatch
from thornback.engine.compiled import Program
from thornback.engine.decoder_program import DecoderProgram
from thornback.engine.draft_model import DraftModel
from thornback.engine.layout import lay_level
from thornback.engine.paged_attention import PagedTokens


class Levels(Protocol):
    """Looks behind the nodes of one level after the other."""

    def begin(self, lengths: np.ndarray, table: np.ndarray, scale: Tensor, hidden: Tensor | None) -> None:
        """New trees, behind sequences of `lengths` `[B]` tokens, whose blocks are in the rows of `table` `[B, N]`.
        `scale` `[B]`: what their logits are multiplied by; `hidden` `[B, H]`: what is guessed of their last tokens."""
        ...

    def look(self, level: Level, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens behind each node of level `number`, counted from 1, int64 `[B * width, width]`, and
        their probabilities, float32: good until the next look."""
        ...


def likeliest(logits: Tensor, scale: Tensor, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The likeliest tokens of each row, their probabilities, and the logarithms of the rows' denominators."""
    if kernels.usable(logits):
        tokens, chances, norm = kernels.likeliest(logits, scale, width)
        return tokens.numpy(), chances.numpy(), norm.numpy()
    scores = logits.float() * scale[:, None]
    norm = scores.logsumexp(-1)
    best, tokens = scores.topk(width)
    return tokens.cpu().numpy(), (best - norm[:, None]).exp().cpu().numpy(), norm.cpu().numpy()


class PlainLevels:
    """Through the modules of any draft."""

    def __init__(self, model: DraftModel, width: int) -> None:
        self._model, self._width = model, width

    def begin(self, lengths: np.ndarray, table: np.ndarray, scale: Tensor, hidden: Tensor | None) -> None:
        self._lengths, self._table, self._hidden = lengths, table, hidden
        self._scale = scale.repeat_interleave(self._width)
        self._owners = np.repeat(np.arange(len(lengths)), self._width)

    def look(self, level: Level, number: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = self._lengths[self._owners]
        rows = np.tile(np.arange(self._width) + level.num_before, len(self._lengths)) + lengths
        places = rows, lengths + number - 1, lengths - 1, level.bits
        pool = self._model.pool
        paged = PagedBatch.of_nodes(pool, self._owners, self._table, *places)
        if self._hidden is not None:
            self._hidden = self._hidden[torch.from_numpy(level.rows).to(pool.device)]
        ids = torch.from_numpy(level.tokens).to(pool.device)
        logits, self._hidden = self._model.run(ids, self._hidden, None, paged)
        return likeliest(logits, self._scale, self._width)[:2]


class CompiledLevels:
    """As one program of kernels a level, which goes from what nodes stand under to what is likely behind them. All
    that it reads and writes stays where it is from level to level."""

    def __init__(self, program: DecoderProgram, pool: Tensor, width: int) -> None:
        self._decoder, self._pool, self._width = program, pool, width
        self._version = self._capacity = 0

    def begin(self, lengths: np.ndarray, table: np.ndarray, scale: Tensor, hidden: Tensor | None) -> None:
        num = len(lengths) * self._width
        if num > self._capacity or self._version != self._decoder.version:
            self._build(1 << (num - 1).bit_length())
        if num != self._calls.num:
            self._resize(num)
        self._lengths, self._table = lengths, torch.from_numpy(table)
        self._scale[: len(lengths)] = scale[:, None]
        if hidden is not None:
            self._calls.states[: len(hidden)] = hidden
        self._calls.stand(self._positions, self._slots, PagedTokens(*self._seen, self._table))

    def look(self, level: Level, number: int) -> tuple[np.ndarray, np.ndarray]:
        self._nodes[:] = level.tokens, level.rows, level.bits
        lay_level(self._lengths, self._table.numpy(), level.num_before, number, *self._strides, *self._places)
        self._program.run(0, len(self._calls.calls), self._calls.threads)
        return self._found

    def _build(self, capacity: int) -> None:
        """Room for levels of so many nodes."""
        width, calls = self._width, self._decoder.calls(capacity, "all")
        self._capacity, self._version = capacity, self._decoder.version
        _, layers, _, kv_heads, size, _ = self._pool.shape
        self._strides = layers * 2 * kv_heads * size, size, kv_heads
        self._integers = torch.zeros(9, capacity, dtype=torch.int64)  # see `_resize`
        self._integers[7], self._integers[8] = torch.arange(capacity), torch.arange(capacity) // width
        self._all_slots = torch.zeros(capacity * kv_heads, dtype=torch.int64)
        self._results = torch.zeros(capacity, width, dtype=torch.int64), torch.zeros(capacity, width)
        tokens, chances = self._results
        self._scale = torch.zeros(capacity // width, width)
        self._scores = logits, norm = torch.empty(capacity, calls.head.outputs), torch.empty(capacity)
        ids, rows = self._integers[:2]
        calls.embed.index, calls.head.out = ids.data_ptr(), logits.data_ptr()
        if calls.from_hidden is not None:
            size = calls.states.shape[1]
            self._hidden = torch.empty(capacity, size)
            calls.from_hidden.x = self._hidden.data_ptr()
            calls.add(kernels.gather, table=calls.states, rows=capacity, index=rows, out=self._hidden, width=size)
            calls.calls.insert(0, calls.calls.pop())  # `states` is written over by what follows
        calls.add(
            kernels.find_likeliest,
            scores=logits, vocabulary=logits.shape[1], scale=self._scale, k=width,
            tokens=tokens, chances=chances, norm=norm,
        )  # fmt: skip
        self._calls, self._program = calls, Program(calls.calls)

    def _resize(self, num: int) -> None:
        """Go on with levels of so many nodes."""
        self._calls.resize(num)
        _, _, bits, places, positions, seen, bases, order, owners = self._integers[:, :num]
        self._positions, self._slots = positions, self._all_slots[: num * self._strides[2]]
        self._seen = order, owners, seen, bases, bits
        self._nodes = self._integers[:3, :num].numpy()
        self._places = [x.numpy() for x in (places, positions, self._slots, seen, bases)]
        tokens, chances = (x[:num].numpy() for x in self._results)
        self._found = tokens, chances
