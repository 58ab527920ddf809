"""One forward pass: from scheduled sequences to logits and drawn tokens."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from thornback.engine.attention import PagedBatch
from thornback.engine.block_tables import BlockTables
from thornback.engine.decoder_program import DecoderProgram
from thornback.engine.kv_pool import KVPool
from thornback.engine.layout import NO_PARENTS, weave
from thornback.engine.lora import AdapterSet
from thornback.engine.randomness import positional_uniform
from thornback.engine.sampler import Sampled, SamplingBatch, sample
from thornback.engine.scheduler import Scheduled
from thornback.engine.sequence import Sequence
from thornback.engine.structured import GrammarCompiler


class ModelRunner:
    """Owns the model and its place; the pool is the engine's.

    Most passes are those of the same sequences as the one before, one token further: what has not changed since is
    kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pool: KVPool,
        adapters: AdapterSet,
        max_model_len: int,
        keep_hidden: bool = False,
    ) -> None:
        """`keep_hidden`: after each pass `hidden` holds the last hidden states of all its tokens, `[T, H]`."""
        self.model = model
        self.pool = pool
        self.adapters = adapters
        self.device = next(model.parameters()).device
        self._program = DecoderProgram.of(model, pool.tensor, max_model_len, keep_hidden)
        self.hidden: Tensor | None = None
        if keep_hidden and self._program is None:
            model.base_model.register_forward_hook(self._keep_hidden)
        self._tables = BlockTables()
        self._decoding: list[Sequence] = []  # in the last pass, if it was of one token each
        self._drawing: list[Sequence] = []

    def forward(
        self, batch: list[Scheduled], guessed: np.ndarray | None = None, parents: np.ndarray = NO_PARENTS
    ) -> tuple[Tensor, list[int]]:
        """Run the scheduled tokens, and their drafts': `guessed` and `parents`, int32, of all of them. Returns the
        logits `[rows, V]` that somebody needs, and for each scheduled sequence the first of its rows: one row, its last
        token's, or all of its tokens' where prompt log-probabilities are asked for (none where neither is); the rows of
        its draft's nodes follow."""
        sequences = [item.seq for item in batch]
        if self.adapters.names:
            names = [seq.request.adapter for seq in sequences]
            self.adapters.place(names, [item.num_tokens for item in batch], self.device)
        contexts = [seq.num_computed_tokens for seq in sequences]
        if (
            sequences == self._decoding
            and not len(parents)
            and self._paged.advance(contexts, [seq.block_table for seq in sequences])
        ):
            tokens = np.array([seq.token_ids[-1] for seq in sequences])
        else:
            tokens = self._prepare(batch, sequences, contexts, parents if guessed is None else guessed, parents)
        return self._run(torch.from_numpy(tokens).to(self.device), self._rows, self._paged), self._first_row

    @torch.inference_mode()
    def try_pass(self, num_tokens: int) -> None:
        """A pass of so many sequences' first tokens, to see what it takes; it spoils the pool's first block."""
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        paged = PagedBatch.of(self.pool.tensor, [1] * num_tokens, [0] * num_tokens, [[0]] * num_tokens)
        self._run(zeros, torch.arange(num_tokens, device=self.device), paged).cpu()

    def _run(self, token_ids: Tensor, rows: Tensor, paged: PagedBatch) -> Tensor:
        """Logits `[R, V]` of the rows `[R]` of `token_ids` `[T]`."""
        if self._program is not None:
            logits, self.hidden = self._program(token_ids, rows, paged)
            return logits
        return self.model(
            input_ids=token_ids[None],
            position_ids=paged.positions[None],
            use_cache=False,
            logits_to_keep=0 if len(rows) == len(token_ids) else rows,  # 0: all
            batch=paged,
        ).logits[0]

    def _keep_hidden(self, module: Any, inputs: Any, output: Any) -> None:
        self.hidden = output.last_hidden_state[0]

    def _prepare(
        self,
        batch: list[Scheduled],
        sequences: list[Sequence],
        contexts: list[int],
        guessed: np.ndarray,
        parents: np.ndarray,
    ) -> np.ndarray:
        """What a pass needs to know, from nothing; returns its tokens."""
        tokens: list[int] = []
        wanted: list[int] = []  # of the rows of each sequence's own tokens: the last so many
        for item, start in zip(batch, contexts, strict=True):
            seq, n = item.seq, item.num_tokens
            tokens += seq.token_ids[start : start + n]
            wanted.append(n if seq.prompt_logprobs is not None and start < seq.num_prompt_tokens else int(item.draws))
        counts = np.array([item.num_tokens for item in batch])
        stops = np.array([item.num_draft_tokens for item in batch]).cumsum()
        ids, rows, first, totals = weave(np.array(tokens), counts, np.array(wanted), guessed, stops)
        self._first_row = first.tolist()
        self._rows = torch.from_numpy(rows).to(self.device)
        table = self._tables.of([seq.block_table for seq in sequences])
        self._paged = PagedBatch.of_trees(self.pool.tensor, totals, np.array(contexts), table, parents, stops)
        all_draw = len(ids) == len(rows) == len(batch)
        self._decoding = sequences if all_draw and not self._paged.groups else []
        return ids

    @property
    def runs_compiled(self) -> bool:
        """Whether passes run as one program of compiled kernels, not through the model's modules."""
        return self._program is not None

    def refresh(self) -> None:
        """The model's weights have changed: so must copies of them."""
        if self._program is not None:
            self._program.load()

    def draw(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        owners: np.ndarray,
        ahead: np.ndarray,
        grammars: GrammarCompiler | None,
    ) -> Sampled:
        """Draw a token from each row of `logits` `[B, V]`, for sequence `owners` `[B]`: the next one, or that so many
        places `ahead` `[B]` of it."""
        if sequences != self._drawing:
            self._drawing = sequences
            self._sampling = SamplingBatch.of([seq.request.sampling for seq in sequences], logits.device)
            self._seeds = np.asarray([seq.seed for seq in sequences], np.uint64)
            self._restrained = any(s.grammar is not None or s.request.sampling.min_tokens for s in sequences)
        places = np.array([seq.num_output_tokens for seq in sequences])[owners] + ahead
        sampling = self._sampling if len(owners) == len(sequences) else self._sampling.of_rows(owners)
        banned = None
        if self._restrained:
            banned = self._banned([sequences[owner] for owner in owners.tolist()], places.tolist(), logits, grammars)
        return sample(logits, sampling, positional_uniform(self._seeds[owners], places), banned)

    def _banned(
        self, sequences: list[Sequence], places: list[int], logits: Tensor, grammars: GrammarCompiler | None
    ) -> Tensor | None:
        """bool `[B, V]`: tokens that a grammar forbids, and stop tokens before `min_tokens`; None: nothing is."""
        short = [i for i, s in enumerate(sequences) if places[i] < s.request.sampling.min_tokens]
        constrained = any(s.grammar is not None for s in sequences)
        if not (short or constrained):
            return None
        banned = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        if constrained:
            assert grammars is not None
            banned |= grammars.banned([s.grammar for s in sequences]).to(logits.device)
        for i in short:
            banned[i, list(sequences[i].stop_ids)] = True
        return banned

    def prompt_scores(self, logits: Tensor, seq: Sequence, start: int, top: int) -> list:
        """Log-probabilities of the prompt's tokens after position `start`, predicted by `logits` `[n, V]`."""
        scores = logits.float().log_softmax(-1)
        following = seq.token_ids[start + 1 : min(start + 1 + len(scores), seq.num_prompt_tokens)]
        result = []
        for row, token in zip(scores, following, strict=False):
            values, ids = row.topk(top) if top else (row[:0], row[:0].long())
            alternatives = list(zip(ids.tolist(), values.tolist(), strict=True))
            result.append((float(row[token]), alternatives))
        return result


def fresh_seeds() -> itertools.count:
    """Seeds for requests that bring none; a gap between them leaves room for the samples of one request."""
    start = int.from_bytes(np.random.default_rng().bytes(5), "little")
    return itertools.count(start << 20, 1 << 20)
