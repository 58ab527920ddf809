"""Grows draft trees with a draft model, level by level (EAGLE-2; RASD, papers.md section 3)."""

from __future__ import annotations

import time
from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thornback.algorithms import Growth
from thornback.contracts import KVImport, SpeculationConfig, WeightView
from thornback.engine.attention import PagedBatch
from thornback.engine.block_manager import BlockManager
from thornback.engine.block_tables import BlockTables
from thornback.engine.draft_levels import CompiledLevels, Levels, PlainLevels, likeliest
from thornback.engine.draft_model import DraftModel, HeadDraft, LoadedDraft, draft_model
from thornback.engine.layout import NO_PARENTS
from thornback.engine.sequence import Sequence
from thornback.engine.weights import bind_weights

_USUAL = 16  # tokens that are read of a sequence, at most, where the pass before was guessed for, too
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
        width, program = config.draft_top_k, self.model.program
        self._levels: Levels = (
            PlainLevels(self.model, width) if program is None else CompiledLevels(program, self.model.pool, width)
        )
        self._tables = BlockTables()
        self.catch_up_seconds = 0.0  # of the last proposal: spent on tokens that no later one has to read again
        self._proposals: dict[int, float] = {}  # seconds of a proposal, by the number of sequences
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
        self.catch_up_seconds, began = 0.0, time.perf_counter()
        short = [s for s in sequences if len(s.token_ids) + depth <= self.model.max_len]
        able = [s for s in self._near(short) if self._blocks.grow(s, len(s.token_ids) + width * (depth - 1))]
        if not able:
            return [None] * len(sequences)
        scales = [1.0 / s.request.sampling.temperature if s.request.sampling.temperature else 1.0 for s in able]
        scale = torch.tensor(scales, dtype=torch.float32, device=self._pool.device)
        lengths, table = [len(s.token_ids) for s in able], self._tables.of([s.block_table for s in able])
        scores, hidden = self._read(able, lengths, table)
        tokens, chances, norms = likeliest(scores, scale, width)
        least = chances[:, -1]
        growth = Growth(len(able), width, depth)
        growth.add(tokens, chances)
        self._levels.begin(np.array(lengths), table, scale, hidden)
        for number in range(1, depth):
            started = time.perf_counter()
            level = growth.expand()
            if level.promise.sum() < least_promise:
                break
            growth.add(*self._levels.look(level, number))
            self._took(len(able), time.perf_counter() - started)
        for seq in able:
            self._blocks.trim(seq, len(seq.token_ids))
        parts = zip(growth.trees(), scores.float().cpu().numpy(), scales, norms.tolist(), least.tolist(), strict=True)
        found = dict(zip(able, (Drafted(*part) for part in parts), strict=True))
        seconds = time.perf_counter() - began - self.catch_up_seconds
        self._proposals[len(able)] = min(seconds, self._proposals.get(len(able), seconds))
        return [found.get(s) for s in sequences]

    def _took(self, num_sequences: int, seconds: float) -> None:
        before = self._seconds.get(num_sequences.bit_length(), seconds)
        self._seconds[num_sequences.bit_length()] = before + 0.1 * (seconds - before)

    def seconds(self, num_sequences: int) -> float:
        """What a proposal for so many sequences takes, about, after those that were seen; 0 before the first."""
        if not self._proposals:
            return 0.0
        nearest = min(self._proposals, key=lambda n: abs(n - num_sequences))
        return self._proposals[nearest] * max(1.0, num_sequences / nearest)

    def forget_times(self) -> None:
        """What levels took until now says nothing of those to come: it was for the first time."""
        self._seconds.clear()

    def level_seconds(self, num_sequences: int) -> float:
        """What a level of so many trees takes, as of late; 0 before the first."""
        return self._seconds.get(num_sequences.bit_length(), 0.0)

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

    def _read(
        self, sequences: List[Sequence], stops: List[int], table: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Read the tokens that the draft has not read, up to `stops`; returns, of each sequence's last one, logits
        `[B, V]` and guessed hidden states `[B, H]`. `table`: the sequences' blocks, if it is at hand."""
        # The last token is read again where no pass came in between.
        starts = [min(s.num_drafted_tokens, stop - 1) for s, stop in zip(sequences, stops, strict=True)]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        hidden = self._hidden(sequences, starts, lengths) if self.reads_hidden else None
        ids = np.concatenate([s.context()[a:b] for s, a, b in zip(sequences, starts, stops, strict=True)])
        if table is None:
            table = self._tables.of([s.block_table for s in sequences])
        no_trees = NO_PARENTS, np.zeros(len(starts), np.int64)
        paged = PagedBatch.of_trees(self._pool, np.array(lengths), np.array(starts), table, *no_trees)
        last, started = self._tensor(np.cumsum(lengths) - 1), time.perf_counter()
        logits, states = self.model.run(self._tensor(ids), hidden, last, paged)
        new = max(0.0, 1 - len(sequences) * _USUAL / len(ids))
        self.catch_up_seconds += new * (time.perf_counter() - started)
        for seq, stop in zip(sequences, stops, strict=True):
            self._blocks.draft_is_in(
                seq.block_table[seq.num_drafted_tokens // self._blocks.block_size : stop // self._blocks.block_size]
            )
            seq.num_drafted_tokens = stop
        return logits, None if states is None else states.index_select(0, last)

    def _hidden(self, sequences: List[Sequence], starts: List[int], lengths: List[int]) -> Tensor:
        """The target's hidden states before so many tokens of each sequence, `[T, H]`; 0 where they are not known."""
        hidden = torch.zeros(sum(lengths), self.model.hidden_size, dtype=self._pool.dtype, device=self._pool.device)
        moves: dict[int, tuple[Tensor, list[int], list[int]]] = {}  # from rows of a pass's states to rows of these
        at = 0
        for seq, start, length in zip(sequences, starts, lengths, strict=True):
            known = seq.hidden
            for position, states, row, count in known:
                to = position + 1 - start  # the state after a token goes with the next one
                skipped, count = max(0, -to), min(count, length - to)
                if count > skipped:
                    _, sources, targets = moves.setdefault(id(states), (states, [], []))
                    sources += range(row + skipped, row + count)
                    targets += range(at + to + skipped, at + to + count)
            at += length
            # Those before the last token that the target has seen are read for good.
            stop = min(start + length, seq.num_computed_tokens)
            while known and known[0][0] + known[0][3] < stop:
                known.popleft()
        for states, sources, targets in moves.values():
            hidden.index_copy_(0, self._tensor(targets), states.index_select(0, self._tensor(sources)))
        return hidden

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
        _, states, row, count = seq.hidden[-1]
        return seq.num_drafted_tokens, states[row + count - 1].float().cpu().numpy()

    def _tensor(self, values: np.ndarray | List[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self._pool.device)
