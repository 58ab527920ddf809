"""Grows draft trees with a draft model, level by level (EAGLE-2; RASD, papers.md section 3)."""

from __future__ import annotations

import time
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thornback.algorithms import Growth, Level
from thornback.contracts import KVImport, SpeculationConfig, WeightView
from thornback.engine import kernels
from thornback.engine.attention import PagedBatch
from thornback.engine.block_manager import BlockManager
from thornback.engine.draft_model import DraftModel, HeadDraft, LoadedDraft, draft_model
from thornback.engine.sequence import Sequence
from thornback.engine.weights import bind_weights

_READS = 2048  # tokens that a draft reads beside one pass of its target, so that a long prompt stalls nobody


@dataclass(slots=True)
class Drafted:
    """A draft's tree, each node weighing the probability of the path to it. What a draft holds of any next token:
    `scores` `[V]` times `scale`, less `norm`, is the logarithm of its probability; `least`: of its last choice."""

    tree: tuple[np.ndarray, np.ndarray, np.ndarray]
    scores: np.ndarray
    scale: float
    norm: float
    least: float

    def chances(self, tokens: np.ndarray) -> np.ndarray:
        """The probabilities of some tokens."""
        return np.exp(self.scores[tokens] * self.scale - self.norm)


class Drafter:
    """A draft and what it has read of each sequence."""

    def __init__(
        self,
        config: SpeculationConfig,
        draft: LoadedDraft,
        pool: Tensor,
        blocks: BlockManager,
        max_model_len: int,
    ) -> None:
        """`pool`: the target's."""
        self.model: DraftModel = draft_model(draft, pool, max_model_len)
        self.head = self.model.head if isinstance(self.model, HeadDraft) else None  # what can learn from the target
        self.reads_hidden = self.model.hidden_size > 0
        self._config, self._blocks, self._pool = config, blocks, self.model.pool
        self._seconds: dict[int, float] = {}  # of a level, by the number of sequences in powers of two

    def refresh(self) -> None:
        """The target's weights have changed: so must copies of those that a head borrows."""
        self.model.refresh()

    def load(self, weights: WeightView) -> None:
        """Give the head these parameters; raises `ModelError` if they do not fit. What it has read is worth nothing
        then: the engine forgets it."""
        assert self.head is not None, "a small model's parameters are its own"
        bind_weights(self.head, weights)
        self.refresh()

    @torch.inference_mode()
    def propose(self, sequences: List[Sequence], least_promise: float = 0.0) -> list[Drafted | None]:
        """A tree for each sequence whose last token no pass has seen yet; None where the pool has no room, where the
        draft cannot reach so far, or where it has more to read first than goes into one pass. Levels whose nodes
        promise fewer than `least_promise` accepted tokens in all are left out."""
        width, depth = self._config.draft_top_k, self._config.draft_depth
        short = [s for s in sequences if len(s.token_ids) + depth <= self.model.max_len]
        able = [s for s in self._near(short) if self._blocks.grow(s, len(s.token_ids) + width * (depth - 1))]
        if not able:
            return [None] * len(sequences)
        scales = [1.0 / s.request.sampling.temperature if s.request.sampling.temperature else 1.0 for s in able]
        scale = torch.tensor(scales, dtype=torch.float32, device=self._pool.device)
        scores, hidden = self._read(able, [len(s.token_ids) for s in able])
        tokens, chances, norms = self._likeliest(scores, scale)
        least, norm, scale = chances[:, -1], norms, scale.repeat_interleave(width)
        growth, pass_of = Growth(len(able), width, depth), LevelPass(self._pool, able, width)
        growth.add(tokens, chances)
        for number in range(1, depth):
            started = time.perf_counter()
            level = growth.expand()
            if level.promise.sum() < least_promise:
                break
            paged = pass_of(level, number)
            if hidden is not None:
                hidden = hidden[self._tensor(level.rows)]
            logits, hidden = self.model.run(self._tensor(level.tokens), hidden, None, paged)
            growth.add(*self._likeliest(logits, scale)[:2])
            self._took(len(able), time.perf_counter() - started)
        for seq in able:
            self._blocks.trim(seq, len(seq.token_ids))
        parts = zip(growth.trees(), scores.float().cpu().numpy(), scales, norm.tolist(), least.tolist(), strict=True)
        found = dict(zip(able, (Drafted(*part) for part in parts), strict=True))
        return [found.get(s) for s in sequences]

    def _took(self, num_sequences: int, seconds: float) -> None:
        before = self._seconds.get(num_sequences.bit_length(), seconds)
        self._seconds[num_sequences.bit_length()] = before + 0.1 * (seconds - before)

    def level_seconds(self, num_sequences: int) -> float:
        """What a level of so many trees takes, as of late; 0 before the first."""
        return self._seconds.get(num_sequences.bit_length(), 0.0)

    def _likeliest(self, logits: Tensor, scale: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The likeliest tokens of each row, their probabilities, and the logarithms of the rows' denominators."""
        width = self._config.draft_top_k
        if kernels.usable(logits):
            return tuple(x.numpy() for x in kernels.likeliest(logits, scale, width))
        scores = logits.float() * scale[:, None]
        norm = scores.logsumexp(-1)
        best, tokens = scores.topk(width)
        return tokens.cpu().numpy(), (best - norm[:, None]).exp().cpu().numpy(), norm.cpu().numpy()

    @torch.inference_mode()
    def catch_up(self, seq: Sequence) -> None:
        """Keys and values of all that the target has seen, without a guess."""
        stop = min(seq.num_computed_tokens, self.model.max_len)
        while seq.num_drafted_tokens < stop:
            self._read([seq], [min(seq.num_drafted_tokens + _READS, stop)])

    def _near(self, sequences: List[Sequence]) -> list[Sequence]:
        """The sequences that one pass brings up to date, the nearest first. Those that are further behind, such as a
        prompt that another engine has computed, read a part meanwhile."""
        near, left = [], _READS
        for seq in sorted(sequences, key=lambda s: len(s.token_ids) - s.num_drafted_tokens):
            behind = len(seq.token_ids) - seq.num_drafted_tokens
            if behind <= left:
                near.append(seq)
            elif left > 0:
                self._read([seq], [seq.num_drafted_tokens + left])
            left -= behind
        return near

    def _read(self, sequences: List[Sequence], stops: List[int]) -> tuple[Tensor, Tensor | None]:
        """Read the tokens that the draft has not read, up to `stops`; returns, of each sequence's last one, logits
        `[B, V]` and guessed hidden states `[B, H]`."""
        # The last token is read again where no pass came in between.
        starts = [min(s.num_drafted_tokens, stop - 1) for s, stop in zip(sequences, stops, strict=True)]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        hidden = self._hidden(sequences, starts, lengths) if self.reads_hidden else None
        ids = np.concatenate([s.token_ids[a:b] for s, a, b in zip(sequences, starts, stops, strict=True)])
        paged = PagedBatch.of(self._pool, lengths, starts, [s.block_table for s in sequences])
        last = self._tensor(np.cumsum(lengths) - 1)
        logits, states = self.model.run(self._tensor(ids), hidden, last, paged)
        for seq, stop in zip(sequences, stops, strict=True):
            self._blocks.draft_is_in(
                seq.block_table[seq.num_drafted_tokens // self._blocks.block_size : stop // self._blocks.block_size]
            )
            seq.num_drafted_tokens = stop
        return logits, None if states is None else states[last]

    def _hidden(self, sequences: List[Sequence], starts: List[int], lengths: List[int]) -> Tensor:
        """The target's hidden states before so many tokens of each sequence, `[T, H]`; 0 where they are not known."""
        size, at = self.model.hidden_size, 0
        hidden = torch.zeros(sum(lengths), size, dtype=self._pool.dtype, device=self._pool.device)
        for seq, start, length in zip(sequences, starts, lengths, strict=True):
            for position, states, row, count in seq.hidden:
                to = position + 1 - start  # the state after a token goes with the next one
                skipped = max(0, -to)
                count = min(count, length - to)
                if count > skipped:
                    hidden[at + to + skipped : at + to + count] = states[row + skipped : row + count]
            at += length
            self._keep_from(seq, min(start + length, seq.num_computed_tokens) - 1)
        return hidden

    def _keep_from(self, seq: Sequence, position: int) -> None:
        """Drop the hidden states that are read for good: those before token `position`'s."""
        kept = [(max(position - h[0], 0), *h) for h in seq.hidden if h[0] + h[3] > position]
        seq.hidden.clear()
        seq.hidden.extend((first + cut, states, row + cut, count - cut) for cut, first, states, row, count in kept)

    def take_import(self, seq: Sequence, kv: KVImport) -> None:
        """Go on where another engine's head was; without a word from it, or with a small model, from the tokens
        alone."""
        seq.num_drafted_tokens = kv.num_drafted_tokens if self.reads_hidden else 0
        if self.reads_hidden and kv.hidden is not None:
            states = torch.from_numpy(kv.hidden)[None].to(self._pool)
            seq.hidden.append((kv.num_tokens - 1, states, 0, 1))

    def prepare_export(self, seq: Sequence) -> tuple[int, np.ndarray | None]:
        """How many tokens the exported blocks hold the draft's keys and values of, and the target's last hidden state,
        float32 `[H]`. A head reads all that the target has seen; a small model's own pool stays here."""
        if not self.reads_hidden:
            return 0, None
        self.catch_up(seq)
        _, states, row, _ = seq.hidden[-1]
        return seq.num_drafted_tokens, states[row].float().cpu().numpy()

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self._pool.device)


class LevelPass:
    """Where the nodes of trees stand that a draft grows: behind each sequence, one behind the other, level by level."""

    def __init__(self, pool: Tensor, sequences: List[Sequence], width: int) -> None:
        self._pool, self._width = pool, width
        self._lengths = np.array([len(s.token_ids) for s in sequences])
        self._owners = np.repeat(np.arange(len(sequences)), width)
        self._table = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), np.int64)
        for row, seq in zip(self._table, sequences, strict=True):
            row[: len(seq.block_table)] = seq.block_table

    def __call__(self, level: Level, number: int) -> PagedBatch:
        """The pass over level `number`, counted from 1."""
        rows = np.tile(np.arange(self._width) + level.num_before, len(self._lengths)) + self._lengths[self._owners]
        arrays = (rows, self._lengths[self._owners] + number - 1, self._lengths[self._owners] - 1, level.bits)
        return PagedBatch.of_nodes(self._pool, self._owners, self._table, *arrays)
