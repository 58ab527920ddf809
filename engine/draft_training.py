"""What a draft head learns: to guess what its target thinks next (EAGLE; RASD, papers.md section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from thornback.engine.draft_head import DraftHead
from thornback.engine.packed_attention import PackedBatch


def losses(
    head: DraftHead,
    target: PreTrainedModel,
    sequences: Sequence[np.ndarray],
    depth: int,
    rng: np.random.Generator,
    starts: Sequence[int] | None = None,
) -> tuple[Tensor, list[float]]:
    """The loss, a scalar with gradients to the head, and of each of `depth` guesses in a row how often its first choice
    is the target's. `sequences`: token ids, int64 `[T]` each, longer than `depth`.

    A guess is judged by what the target's output head makes of it (cross entropy with the target's own distribution)
    and by its distance from the target's hidden state. The next one is made on it, a token further. `starts[i]`: the
    first token of sequence i that is worth guessing, such as the first of a response; None: all are.
    """
    device = head.norm.weight.device
    tokens = torch.from_numpy(np.concatenate(sequences)).to(device)
    lengths = np.array([len(s) for s in sequences])
    stops = np.cumsum(lengths)
    positions = np.arange(len(tokens)) - np.repeat(stops - lengths, lengths)
    batch = PackedBatch.of([np.arange(stop - n, stop) for n, stop in zip(lengths, stops, strict=True)], device)
    places = torch.from_numpy(positions).to(device)
    with torch.no_grad():
        states = target.base_model(input_ids=tokens[None], position_ids=places[None], use_cache=False, batch=batch)
        states = states.last_hidden_state[0]
        goal = head.lm_head(states).softmax(-1)
        choice = goal.argmax(-1)
    # What an engine does not know any more is 0: the beginnings of some sequences are unknown here.
    unknown = rng.integers(0, np.maximum(lengths // 2, 1)) * (rng.random(len(lengths)) < 0.25)
    known = torch.from_numpy(positions >= np.maximum(np.repeat(unknown, lengths), 1)).to(device)[:, None]
    # From a token's place the next one is guessed.
    first = np.zeros(len(tokens), np.int64) if starts is None else np.repeat(np.asarray(starts) - 1, lengths)
    hidden, total, agreement = states, torch.zeros((), device=device), []
    for ahead in range(depth):
        before = torch.cat([hidden.new_zeros(1, hidden.shape[1]), hidden[:-1]]) * known
        hidden = head(tokens, before, places, batch)
        judged = torch.from_numpy(positions >= np.maximum(first, ahead)).to(device)
        logits = head.lm_head(hidden)
        entropy = -(goal * logits.log_softmax(-1)).sum(-1)
        distance = functional.smooth_l1_loss(hidden, states, reduction="none").mean(-1)
        total = total + 0.7**ahead * ((entropy + distance) * judged).sum() / judged.sum()
        agreement.append(float(((logits.argmax(-1) == choice) * judged).sum() / judged.sum()))
    return total, agreement


@torch.no_grad()
def agreement_of(
    head: DraftHead, target: PreTrainedModel, sequences: Sequence[np.ndarray], depth: int, batch_size: int
) -> list[float]:
    """How often the head's first choice for the token i + 1 places ahead is the target's, for each i below `depth`."""
    rng = np.random.default_rng(0)
    batches = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    found = [losses(head, target, batch, depth, rng)[1] for batch in batches]
    return [round(float(x), 4) for x in np.mean(found, 0)]
