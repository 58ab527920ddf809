"""Log-probabilities of given sequences under a model, packed without padding: what a learner differentiates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from thornback.engine.attention import PackedBatch

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
    entropies of the same distributions `[sum T]` (detached) if asked for. The output head runs on the positions
    that predict a response token only.
    """
    device = next(model.parameters()).device
    lengths = [len(s) for s in sequences]
    flat = np.concatenate([np.asarray(s, np.int64) for s in sequences])
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    predicted = np.concatenate([np.arange(starts[i] + response_starts[i], starts[i + 1]) for i in range(len(lengths))])
    positions = np.arange(len(flat)) - np.repeat(starts[:-1], lengths)
    inputs = {
        "input_ids": torch.from_numpy(flat)[None].to(device),
        "position_ids": torch.from_numpy(positions)[None].to(device),
        "use_cache": False,
        "batch": PackedBatch.of(lengths, device),
    }
    rows = torch.from_numpy(predicted - 1).to(device)
    targets = torch.from_numpy(flat[predicted]).to(device)
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
