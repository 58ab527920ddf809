"""Grows draft trees with a draft model, level by level (EAGLE-2; RASD, papers.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from thornback.algorithms import Growth
from thornback.contracts import KVImport, SpeculationConfig, TokenTree
from thornback.engine.attention import PagedBatch
from thornback.engine.block_manager import BlockManager
from thornback.engine.decoder_program import DecoderProgram
from thornback.engine.draft_head import load_draft_head
from thornback.engine.sequence import Sequence


@dataclass(slots=True)
class Drafted:
    """A draft's tree, each node weighing the probability of the path to it; and its distribution of the next token,
    `[V]`, by which retrieved trees are pruned."""

    tree: TokenTree
    first: np.ndarray


class Drafter:
    """A draft head and what it knows of each sequence: its keys and values are one more layer of the engine's pool."""

    def __init__(
        self,
        config: SpeculationConfig,
        target: PreTrainedModel,
        pool: Tensor,
        blocks: BlockManager,
        max_model_len: int,
    ) -> None:
        self._config, self._pool, self._blocks, self._max_model_len = config, pool, blocks, max_model_len
        self.head = load_draft_head(config.draft, target, pool.shape[1] - 1)
        self._program = DecoderProgram.of(self.head, pool, max_model_len, keep_hidden=True)
        self._size = self.head.config.hidden_size

    def refresh(self) -> None:
        """The target's weights have changed: so must copies of those that the head borrows."""
        if self._program is not None:
            self._program.load()

    @torch.inference_mode()
    def propose(self, sequences: List[Sequence]) -> list[Drafted | None]:
        """A tree for each sequence whose last token no pass has seen yet; None where the pool has no room."""
        config = self._config
        room = config.draft_top_k * (config.draft_depth - 1)
        able = [
            s
            for s in sequences
            if len(s.token_ids) + config.draft_depth <= self._max_model_len
            and self._blocks.grow(s, len(s.token_ids) + room)
        ]
        if not able:
            return [None] * len(sequences)
        logits, hidden = self._catch_up(able)
        scales = np.array(
            [1.0 / s.request.sampling.temperature if s.request.sampling.temperature else 1.0 for s in able]
        )
        scale = torch.from_numpy(scales.astype(np.float32)).to(logits.device)[:, None]
        first = (logits.float() * scale).softmax(-1)
        probabilities, tokens = first.topk(config.draft_top_k)
        growths = [Growth(config.draft_top_k, room) for _ in able]
        owners = np.arange(len(able))
        for depth in range(config.draft_depth):
            parts = zip(
                growths, _split(tokens, owners, len(able)), _split(probabilities, owners, len(able)), strict=True
            )
            for growth, some, chances in parts:
                growth.add(some, chances)
            if depth == config.draft_depth - 1:
                break
            grown = [growth.expand() for growth in growths]  # rows of the last pass that each looks behind
            counts = np.array([len(g.tokens) for g in grown])
            if not counts.sum():
                break
            offsets = np.cumsum(np.bincount(owners, minlength=len(able))) - np.bincount(owners, minlength=len(able))
            rows = np.concatenate([g.rows + offset for g, offset in zip(grown, offsets, strict=True)])
            owners = np.repeat(np.arange(len(able)), counts)
            paged = PagedBatch.of(
                self._pool,
                counts.tolist(),
                [len(s.token_ids) + g.num_before for s, g in zip(able, grown, strict=True)],
                [s.block_table for s in able],
                {i: g.parents for i, g in enumerate(grown)},
            )
            ids = self._tensor(np.concatenate([g.tokens for g in grown]))
            logits, hidden = self._run(ids, hidden[self._tensor(rows)], self._tensor(np.arange(len(ids))), paged)
            probabilities, tokens = (logits.float() * scale[self._tensor(owners)]).softmax(-1).topk(config.draft_top_k)
        for seq in able:
            self._blocks.trim(seq, len(seq.token_ids))
        found = {
            s: Drafted(TokenTree(*growth.tree()), p)
            for s, growth, p in zip(able, growths, first.cpu().numpy(), strict=True)
        }
        return [found.get(s) for s in sequences]

    @torch.inference_mode()
    def catch_up(self, sequences: List[Sequence]) -> None:
        """Keys and values of all that the target has seen, without a guess."""
        behind = [s for s in sequences if s.num_drafted_tokens < s.num_computed_tokens]
        if behind:
            self._catch_up(behind, ahead=0)

    def _catch_up(self, sequences: List[Sequence], ahead: int = 1) -> tuple[Tensor, Tensor]:
        """Read the tokens that the head has not read; returns, of each sequence's last one, logits `[B, V]` and guessed
        hidden states `[B, H]`."""
        stops = [s.num_computed_tokens + ahead for s in sequences]
        # The last token is read again where no pass came in between.
        starts = [min(s.num_drafted_tokens, stop - 1) for s, stop in zip(sequences, stops, strict=True)]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        hidden = torch.zeros(sum(lengths), self._size, dtype=self._pool.dtype, device=self._pool.device)
        at = 0
        for seq, start, length in zip(sequences, starts, lengths, strict=True):
            for position, states, row, count in seq.hidden:
                to = position + 1 - start  # the state after a token goes with the next one
                skipped = max(0, -to)
                count = min(count, length - to)
                if count > skipped:
                    hidden[at + to + skipped : at + to + count] = states[row + skipped : row + count]
            at += length
            self._keep_from(seq, start + length - 1 - ahead)
        ids = np.concatenate([s.token_ids[a:b] for s, a, b in zip(sequences, starts, stops, strict=True)])
        paged = PagedBatch.of(self._pool, lengths, starts, [s.block_table for s in sequences])
        last = self._tensor(np.cumsum(lengths) - 1)
        logits, states = self._run(self._tensor(ids), hidden, last, paged)
        for seq, stop in zip(sequences, stops, strict=True):
            self._blocks.draft_is_in(
                seq.block_table[seq.num_drafted_tokens // self._blocks.block_size : stop // self._blocks.block_size]
            )
            seq.num_drafted_tokens = stop
        return logits, states[last]

    def _keep_from(self, seq: Sequence, position: int) -> None:
        """Drop the hidden states that are read for good: those before token `position`'s."""
        kept = [(max(position - h[0], 0), *h) for h in seq.hidden if h[0] + h[3] > position]
        seq.hidden.clear()
        seq.hidden.extend((first + cut, states, row + cut, count - cut) for cut, first, states, row, count in kept)

    def take_import(self, seq: Sequence, kv: KVImport) -> None:
        """Go on where another engine's head was; without a word from it, from the tokens alone."""
        seq.num_drafted_tokens = kv.num_drafted_tokens
        if kv.hidden is not None:
            states = torch.from_numpy(kv.hidden)[None].to(self._pool)
            seq.hidden.append((kv.num_tokens - 1, states, 0, 1))

    def prepare_export(self, seq: Sequence) -> np.ndarray:
        """Read all that the target has seen; returns its last hidden state, float32 `[H]`."""
        self.catch_up([seq])
        _, states, row, _ = seq.hidden[-1]
        return states[row].float().cpu().numpy()

    def _run(self, ids: Tensor, hidden: Tensor, rows: Tensor, paged: PagedBatch) -> tuple[Tensor, Tensor]:
        """Logits `[R, V]` of some rows and the guessed hidden states of all, `[T, H]`."""
        if self._program is not None:
            logits, states = self._program(ids, rows, paged, hidden)
            assert states is not None
            return logits, states
        states = self.head(ids, hidden, paged.positions, paged)
        return self.head.lm_head(states[rows]), states

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self._pool.device)


def _split(values: Tensor, owners: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of values by the sequences that own them."""
    counts = np.bincount(owners, minlength=count)
    return np.split(values.cpu().numpy(), np.cumsum(counts)[:-1])
