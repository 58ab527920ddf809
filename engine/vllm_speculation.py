"""RASD for vLLM, which verifies chains: the best one of the fused tree of what was retrieved and drafted.

vLLM asks for guesses after a pass and verifies them in the next; here both sides meet. Draws by position make
verification a comparison: what the model draws after each guess is what it would have drawn without it.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from math import prod
from typing import Any

import numpy as np
import torch

from thornback.contracts import EngineConfig, Request, SamplingParams, SpeculationConfig
from thornback.engine.block_manager import BlockManager
from thornback.engine.draft_files import check_vocabulary, head_refused, holds_head, is_hub_name, read_draft_config
from thornback.engine.drafter import Drafter
from thornback.engine.model import ModelShape, load_model
from thornback.engine.sequence import Sequence
from thornback.engine.speculation import Speculation


def speculative_config(config: SpeculationConfig) -> dict[str, Any]:
    """vLLM's argument of this name. Raises `ConfigError` for what vLLM cannot guess by."""
    if config.draft and not is_hub_name(config.draft) and holds_head(read_draft_config(config.draft, {})):
        raise head_refused(config.draft)
    proposer = f"{ChainProposer.__module__}.{ChainProposer.__qualname__}"
    return {"method": "custom_class", "model": proposer, "num_speculative_tokens": config.num_nodes}


class ChainProposer:
    """What vLLM calls for guesses (`custom_class`). It guesses nothing until it is told whose runner it serves."""

    def __init__(self, vllm_config: Any) -> None:
        self._runner: Any = None
        self._speculation: Speculation
        self._blocks: BlockManager | None = None  # of a draft's keys and values
        self._sequences: dict[str, Sequence] = {}  # by vLLM's ids
        self._expected: set[str] = set()  # who decodes in the next pass, if nothing comes in between
        self._chains: dict[str, np.ndarray] = {}  # what was proposed for it

    def serve(self, runner: Any, speculation: Speculation, blocks: BlockManager | None) -> None:
        """`blocks`: where the draft's keys and values lie, if there is a draft."""
        self._runner, self._speculation, self._blocks = runner, speculation, blocks

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM has no model to load for it."""

    def use(self, speculation: Speculation) -> None:
        """Guess by another one from now on; no requests run."""
        for name in list(self._sequences):
            self._forget(name)
        self._speculation = speculation

    def propose(
        self,
        sampled_token_ids: List[List[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """A chain for each row of the batch, after a pass that gave each so many tokens (a part of a prompt: none)."""
        self._chains = {}
        if self._runner is None:
            return [[] for _ in sampled_token_ids]
        names = self._runner.input_batch.req_ids
        if set(names) != self._expected:
            self._speculation.disturbed()
        self._speculation.observe(sum(map(len, sampled_token_ids)))
        for name in self._sequences.keys() - self._runner.requests.keys():
            self._forget(name)
        going = []
        for row, (name, new) in enumerate(zip(names, sampled_token_ids, strict=True)):
            if not new:
                continue
            seq = self._sequences.get(name) or self._begin(name)
            seq.token_ids += token_ids_cpu[row, len(seq.token_ids) : num_tokens_no_spec[row]].tolist()
            seq.num_computed_tokens = len(seq.token_ids) - 1
            if seq.stop_ids.isdisjoint(new) and seq.num_output_tokens < seq.request.sampling.max_tokens:
                going.append(seq)  # vLLM ends the others
        self._expected = {seq.request.request_id for seq in going}
        self._speculation.propose(going)
        guesses = self._speculation.guesses
        if guesses is not None:
            parts = np.split(guesses.tokens, guesses.stops[:-1])
            self._chains = {seq.request.request_id: part for seq, part in zip(guesses.sequences, parts, strict=True)}
        return [self._chains[name].tolist() if name in self._chains else [] for name in names]

    def settle(self, counts: np.ndarray, guessed: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """How many of the guesses of each row of the batch are right, int64 `[B]`. Row i has `counts[i]` of `guessed`,
        one row's behind the other's; `drawn`: what the model drew after its last token and after each of them."""
        names = self._runner.input_batch.req_ids
        starts = np.cumsum(counts) - counts
        rows = starts + np.arange(len(counts))
        right = np.zeros(len(counts), np.int64)
        for i, (count, start, row) in enumerate(zip(counts, starts, rows, strict=True)):
            wrong = np.flatnonzero(guessed[start : start + count] != drawn[row : row + count])
            right[i] = wrong[0] if len(wrong) else count
        guesses = self._speculation.guesses
        if guesses is not None:
            place = {name: i for i, name in enumerate(names)}
            ours = np.array([place.get(seq.request.request_id, -1) for seq in guesses.sequences])
            # vLLM verifies no more of a chain than it has room for, and may still verify an older one.
            verified = np.where(ours < 0, 0, counts[ours])
            for number, i in enumerate(ours):
                chain = guessed[starts[i] : starts[i] + counts[i]]
                if verified[number] and not np.array_equal(chain, self._chains[names[i]][: counts[i]]):
                    verified[number] = 0
            guesses.shorten(verified)
            self._speculation.settle(drawn, np.where(ours < 0, 0, rows[ours]))
        return right

    def _begin(self, name: str) -> Sequence:
        state = self._runner.requests[name]
        extra = state.sampling_params.extra_args
        before, prompt = extra["position"], state.prompt_token_ids
        sampling = SamplingParams(max_tokens=before + state.sampling_params.max_tokens, **extra["draw"])
        seq = self._sequences[name] = Sequence(
            request=Request(name, tuple(prompt[: len(prompt) - before]), sampling),
            index=0,
            seed=extra["seed"],
            token_ids=list(prompt),
            stop_ids=frozenset(state.sampling_params.stop_token_ids),
            num_prompt_tokens=len(prompt) - before,
            grammar=extra["json_schema"],
        )
        return seq

    def _forget(self, name: str) -> None:
        seq = self._sequences.pop(name)
        self._speculation.forget(seq)
        if self._blocks is not None:
            self._blocks.release(seq.block_table)


def make_drafter(
    config: EngineConfig, vocab_size: int, max_model_len: int, device: str, dtype: str
) -> tuple[Drafter | None, BlockManager | None]:
    """The small model that a configuration names, and the blocks of its keys and values."""
    speculation = config.speculation
    if speculation is None or not speculation.draft:
        return None, None
    model = load_model(speculation.draft, device, dtype)
    check_vocabulary(speculation.draft, ModelShape.of(model).vocab_size, vocab_size)
    block_bytes = prod(ModelShape.of(model).block_shape(config.block_size)) * next(model.parameters()).element_size()
    wanted = -(-max_model_len // config.block_size) * config.max_num_seqs
    blocks = BlockManager(max(1, min(wanted, config.kv_cache_memory_bytes // block_bytes)), config.block_size, False)
    beside = torch.empty(blocks.num_blocks, 0, 0, 0, config.block_size, device=device)  # vLLM's own is elsewhere
    return Drafter(speculation, model, beside, blocks, max_model_len), blocks
