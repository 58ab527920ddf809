"""Log-probabilities of given sequences under a model, packed without padding: what a learner differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from thornback.engine.packed_attention import PackedBatch

_LOGIT_ROWS = 1 << 24  # logits of at most this many numbers are alive at a time


def sequence_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[np.ndarray | list[int]],
    response_starts: Sequence[int],
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of each sequence's tokens from `response_starts[i]` on (at least 1), end to end.

    Returns `[sum T]` in float32, with gradients where they are on, of softmax(logits / temperature), and the
    entropies of the same distributions `[sum T]` (detached) if asked for. Neighbours with the same prompt share
    its computation, and the output head runs only on the positions that predict a response token.
    """
    device = next(model.parameters()).device
    layout = _layout([np.asarray(s, np.int64) for s in sequences], response_starts)
    inputs = {
        "input_ids": torch.from_numpy(layout.token_ids)[None].to(device),
        "position_ids": torch.from_numpy(layout.positions)[None].to(device),
        "use_cache": False,
        "batch": PackedBatch.of(layout.sequences, device),
    }
    rows = torch.from_numpy(layout.predicting).to(device)
    targets = torch.from_numpy(layout.targets).to(device)
    per_chunk = max(1, _LOGIT_ROWS // model.config.get_text_config().vocab_size)
    if len(rows) <= per_chunk or not _plain_head(model):
        logits = model(**inputs, logits_to_keep=rows).logits[0]
        return _score(logits, targets, temperature, with_entropy)
    hidden = model.base_model(**inputs).last_hidden_state[0].index_select(0, rows)
    head = model.get_output_embeddings()

    def chunk(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return _score(head(x), ids, temperature, with_entropy)

    # Large vocabularies: logits are made again in the backward pass instead of being kept.
    pieces = zip(hidden.split(per_chunk), targets.split(per_chunk), strict=True)
    parts = [checkpoint(chunk, x, ids, use_reentrant=False) for x, ids in pieces]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]) if with_entropy else None


@dataclass(slots=True)
class _Layout:
    """Packed tokens and their positions `[T]`; each sequence's rows among them; and for every response token the
    row that predicts it and its id, `[sum responses]`."""

    token_ids: np.ndarray
    positions: np.ndarray
    sequences: list[np.ndarray]
    predicting: np.ndarray
    targets: np.ndarray


def _layout(sequences: list[np.ndarray], response_starts: Sequence[int]) -> _Layout:
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    end = 0

    def append(tokens: np.ndarray, start: int) -> np.ndarray:
        nonlocal end
        pieces.append(tokens)
        positions.append(np.arange(start, start + len(tokens)))
        end += len(tokens)
        return np.arange(end - len(tokens), end)

    prompt = prompt_rows = np.empty(0, np.int64)
    for sequence, start in zip(sequences, response_starts, strict=True):
        if not 0 < start < len(sequence):
            raise ValueError(f"a response starts at {start} in a sequence of {len(sequence)}: it needs a token before.")
        if not np.array_equal(prompt, sequence[:start]):
            prompt = sequence[:start]
            prompt_rows = append(prompt, 0)
        rows.append(np.concatenate([prompt_rows, append(sequence[start:], start)]))
    starts = zip(rows, response_starts, strict=True)
    return _Layout(
        token_ids=np.concatenate(pieces),
        positions=np.concatenate(positions),
        sequences=rows,
        predicting=np.concatenate([r[start - 1 : -1] for r, start in starts]),
        targets=np.concatenate([s[start:] for s, start in zip(sequences, response_starts, strict=True)]),
    )


def _plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are just the output head's product, without an architecture's scaling or capping."""
    config = model.config.get_text_config()
    return not any(getattr(config, n, None) for n in ("logit_scale", "logits_scaling", "final_logit_softcapping"))


def _score(logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = logits.log_softmax(-1)
    entropy = None
    if with_entropy:
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy
