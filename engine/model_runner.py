"""One forward pass: from scheduled sequences to logits and drawn tokens."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from thornback.engine.attention import PagedBatch
from thornback.engine.kv_pool import KVPool
from thornback.engine.lora import AdapterSet
from thornback.engine.randomness import positional_uniform
from thornback.engine.sampler import Sampled, SamplingBatch, sample
from thornback.engine.scheduler import Scheduled
from thornback.engine.sequence import Sequence
from thornback.engine.structured import GrammarCompiler


class ModelRunner:
    """Owns the model and its place; the pool is the engine's."""

    def __init__(self, model: PreTrainedModel, pool: KVPool, adapters: AdapterSet) -> None:
        self.model = model
        self.pool = pool
        self.adapters = adapters
        self.device = next(model.parameters()).device

    @torch.inference_mode()
    def forward(self, batch: list[Scheduled]) -> tuple[Tensor, list[int]]:
        """Run the scheduled tokens. Returns the logits `[rows, V]` that somebody needs, and for each scheduled
        sequence the first of its rows: one row, its last token's, or all of its tokens' where prompt
        log-probabilities are asked for (none where neither is)."""
        tokens: list[int] = []
        rows: list[int] = []
        first_row: list[int] = []
        lengths = [item.num_tokens for item in batch]
        contexts = [item.seq.num_computed_tokens for item in batch]
        for item, n, start in zip(batch, lengths, contexts, strict=True):
            seq = item.seq
            tokens += seq.token_ids[start : start + n]
            first_row.append(len(rows))
            if seq.prompt_logprobs is not None and start < seq.num_prompt_tokens:
                rows += range(len(tokens) - n, len(tokens))
            elif item.draws:
                rows.append(len(tokens) - 1)
        if self.adapters.names:
            self.adapters.place([i.seq.request.adapter for i in batch], lengths, self.device)
        paged = PagedBatch.of(self.pool.tensor, lengths, contexts, [item.seq.block_table for item in batch])
        logits = self.model(
            input_ids=self._tensor(tokens)[None],
            position_ids=paged.positions[None],
            use_cache=False,
            logits_to_keep=0 if len(rows) == len(tokens) else self._tensor(rows),  # 0: all
            batch=paged,
        ).logits[0]
        return logits, first_row

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, sequences: list[Sequence], grammars: GrammarCompiler | None) -> Sampled:
        """Draw the next token of each sequence from its row of `logits` `[B, V]`."""
        params = [seq.request.sampling for seq in sequences]
        uniform = positional_uniform(
            np.asarray([seq.seed for seq in sequences], np.uint64),
            np.asarray([seq.num_output_tokens for seq in sequences], np.uint64),
        )
        return sample(logits, SamplingBatch(params, uniform), self._banned(sequences, logits, grammars))

    def _banned(self, sequences: list[Sequence], logits: Tensor, grammars: GrammarCompiler | None) -> Tensor | None:
        """bool `[B, V]`: tokens that a grammar forbids, and stop tokens before `min_tokens`; None: nothing is."""
        short = [i for i, s in enumerate(sequences) if s.num_output_tokens < s.request.sampling.min_tokens]
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
