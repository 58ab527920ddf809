"""What a drafter asks for the next tokens: a draft head that thinks on where its target has been, or a small model.

Either has keys and values of its own for every token, at the places of the target's: in the same blocks, by the same
block tables. So prompts that begin alike, forks and blocks that are given back need no second bookkeeping.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thornback.contracts import ModelError, SpeculationConfig
from thornback.engine.attention import PagedBatch
from thornback.engine.decoder_program import DecoderProgram
from thornback.engine.draft_files import check_vocabulary, holds_head, is_hub_name, read_draft_config
from thornback.engine.draft_head import DraftHead, load_draft_head
from thornback.engine.kv_pool import KVPool
from thornback.engine.model import ModelShape, load_model

LoadedDraft: TypeAlias = DraftHead | PreTrainedModel


def load_draft(config: SpeculationConfig | None, target: PreTrainedModel) -> LoadedDraft | None:
    """The draft that a configuration names, of its target's type and on its device; None if it names none. Its
    config.json tells a head from a whole model. Raises `ModelError` for one that is damaged, or for another model."""
    if config is None or not config.draft:
        return None
    shape, weight = ModelShape.of(target), next(target.parameters())
    if not is_hub_name(config.draft) and holds_head(read_draft_config(config.draft, {"vocab_size": shape.vocab_size})):
        return load_draft_head(config.draft, target, shape.num_layers)
    model = load_model(config.draft, str(weight.device), str(weight.dtype).removeprefix("torch."))
    check_vocabulary(config.draft, ModelShape.of(model).vocab_size, shape.vocab_size)
    return model


def block_shapes(target: ModelShape, draft: LoadedDraft | None, block_size: int) -> list[tuple[int, ...]]:
    """Of blocks of the target's pool, whose last layer is a head's, and of a small model's own pool."""
    if isinstance(draft, DraftHead):
        target = replace(target, num_layers=target.num_layers + 1)
    shapes = [target, *([] if draft is None or isinstance(draft, DraftHead) else [ModelShape.of(draft)])]
    return [shape.block_shape(block_size) for shape in shapes]


class DraftModel(Protocol):
    """`pool`: where its keys and values lie, a tensor like the target's with as many blocks. `hidden_size`: of the
    target's hidden states, which it reads beside the tokens; 0: it reads tokens alone. `max_len`: tokens of the longest
    sequence that it can guess for. `program`: runs its passes, if they are compiled."""

    pool: Tensor
    hidden_size: int
    max_len: int
    program: DecoderProgram | None

    def run(
        self, token_ids: Tensor, hidden: Tensor | None, rows: Tensor | None, batch: PagedBatch
    ) -> tuple[Tensor, Tensor | None]:
        """A pass over `token_ids` `[T]` and, if it reads them, the hidden states `[T, H]` of the tokens before. Logits
        `[R, V]` of some rows (None: all), and the hidden states `[T, H]` that it guesses for all."""
        ...

    def refresh(self) -> None:
        """The target's weights have changed: so must what it borrows of them."""
        ...

    def copy_block(self, source: int, target: int) -> None:
        """The target has copied this block of its pool."""
        ...


class HeadDraft:
    """A draft head over the last layer of the target's pool, which is copied, moved and exported with the others."""

    def __init__(self, head: DraftHead, pool: Tensor, max_model_len: int) -> None:
        self.head, self.pool, self.max_len = head, pool, max_model_len
        self.hidden_size = head.config.hidden_size
        self.program = DecoderProgram.of(head, pool, max_model_len, keep_hidden=True)

    def run(
        self, token_ids: Tensor, hidden: Tensor | None, rows: Tensor | None, batch: PagedBatch
    ) -> tuple[Tensor, Tensor | None]:
        assert hidden is not None, "a head reads hidden states"
        if self.program is not None:
            return self.program(token_ids, _every(token_ids) if rows is None else rows, batch, hidden)
        states = self.head(token_ids, hidden, batch.positions, batch)
        return self.head.lm_head(states if rows is None else states[rows]), states

    def refresh(self) -> None:
        if self.program is not None:
            self.program.load()

    def copy_block(self, source: int, target: int) -> None:
        pass


class SmallDraft:
    """A small model over a pool of its own. Its keys and values of nodes are never moved to where the target accepted
    them: the next guess is a pass over the accepted tokens anyway, which writes them anew."""

    hidden_size = 0

    def __init__(self, model: PreTrainedModel, beside: Tensor, max_model_len: int) -> None:
        """`beside`: the target's pool. Raises `ModelError` if the model's attention slides within `max_model_len`."""
        shape, weight = ModelShape.of(model), next(model.parameters())
        self.max_len = min(max_model_len, shape.max_positions)
        if shape.sliding_window and shape.sliding_window < self.max_len:
            raise ModelError(
                f"The draft {model.name_or_path} attends to the last {shape.sliding_window} tokens only, which "
                "speculation does not see: give another draft, or make max_model_len no longer than that."
            )
        self._model = model
        self._kv = KVPool(len(beside), shape.block_shape(beside.shape[4]), weight.dtype, weight.device)
        self.pool = self._kv.tensor
        self.program = DecoderProgram.of(model, self.pool, self.max_len)

    def run(
        self, token_ids: Tensor, hidden: Tensor | None, rows: Tensor | None, batch: PagedBatch
    ) -> tuple[Tensor, Tensor | None]:
        if self.program is not None:
            return self.program(token_ids, _every(token_ids) if rows is None else rows, batch)
        found = self._model(
            input_ids=token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=0 if rows is None else rows,  # 0: all
            batch=batch,
        )
        return found.logits[0], None

    def refresh(self) -> None:
        pass  # its weights are its own

    def copy_block(self, source: int, target: int) -> None:
        self._kv.copy_block(source, target)


def _every(token_ids: Tensor) -> Tensor:
    return torch.arange(len(token_ids), device=token_ids.device)


def draft_model(draft: LoadedDraft, pool: Tensor, max_model_len: int) -> DraftModel:
    """A draft in its place beside `pool`, the target's keys and values."""
    place = HeadDraft if isinstance(draft, DraftHead) else SmallDraft
    return place(draft, pool, max_model_len)
