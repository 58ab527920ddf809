"""From logits to tokens: truncation, inverse-CDF draws, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thornback.contracts import SamplingParams
from thornback.engine import kernels

_SPAN = 64  # tokens summed at a time before a draw looks inside one span


@dataclass(slots=True)
class SamplingBatch:
    """Sampling parameters of B rows, as columns: `temperatures` `[B, 1]` (None: all 1), `greedy` int64 `[B]`; `cut`:
    the rows of which some tokens are never drawn. `params` are one a row, or those of `owners` int64 `[B]`."""

    params: list[SamplingParams]
    temperatures: Tensor | None
    greedy: Tensor
    cut: list[int]
    owners: np.ndarray | None = None

    @classmethod
    def of(cls, params: list[SamplingParams], device: torch.device | str = "cpu") -> SamplingBatch:
        temperatures = [p.temperature or 1.0 for p in params]
        return cls(
            params,
            torch.tensor(temperatures, device=device)[:, None] if any(t != 1.0 for t in temperatures) else None,
            torch.tensor([p.temperature == 0.0 for p in params], dtype=torch.int64, device=device),
            [i for i, p in enumerate(params) if _truncates(p)],
        )

    def of_rows(self, owners: np.ndarray) -> SamplingBatch:
        """Rows each of which has the parameters of one of these: `owners` int64 `[R]`."""
        index = torch.from_numpy(owners).to(self.greedy.device)
        return SamplingBatch(
            self.params,
            None if self.temperatures is None else self.temperatures.index_select(0, index),
            self.greedy.index_select(0, index),
            np.flatnonzero(np.isin(owners, self.cut)).tolist() if self.cut else [],
            owners,
        )

    def of_row(self, row: int) -> SamplingParams:
        return self.params[row if self.owners is None else self.owners[row]]


@dataclass(slots=True)
class Sampled:
    """`tokens` int `[B]`, `logprobs` `[B]`; `scores` `[B, V]`: log-probabilities up to each row's `log_norm` `[B]`."""

    tokens: list[int]
    logprobs: list[float]
    scores: Tensor
    log_norm: Tensor

    def top(self, row: int, k: int) -> list[tuple[int, float]]:
        """The k most likely tokens of a row, with log-probabilities."""
        values, ids = self.scores[row].topk(min(k, self.scores.shape[1]))
        return list(zip(ids.tolist(), (values - self.log_norm[row]).tolist(), strict=True))


def sample(logits: Tensor, batch: SamplingBatch, uniform: np.ndarray, banned: Tensor | None = None) -> Sampled:
    """Draw one token a row of `logits` `[B, V]`, by each row's positional number, `uniform` float64 `[B]`.

    Log-probabilities are those of softmax(logits / temperature) (greedy: temperature 1), before `top_k`, `top_p`,
    `min_p` and `banned` (bool `[B, V]`: never drawn) take effect. A draw is the first token id at which the
    cumulative distribution over the tokens left exceeds the row's uniform number.
    """
    scores = logits.float()
    if batch.temperatures is not None:
        scores = scores / batch.temperatures
    numbers = torch.from_numpy(uniform).to(scores.device)
    draw = kernels.draw if kernels.usable(scores) else _draw
    tokens, logprobs, log_norm = draw(scores.contiguous(), numbers, batch.greedy)
    # A row is drawn in one way whatever stands beside it: only rows that need it are drawn from what is left to them.
    cut = batch.cut
    if banned is not None:
        cut = sorted({*cut, *banned.any(-1).nonzero()[:, 0].tolist()})
    if cut:
        rows = torch.tensor(cut, device=scores.device)
        left = _truncated(scores[rows], [batch.of_row(i) for i in cut], None if banned is None else banned[rows])
        tokens[rows] = _pick(left, _span_sums(left), numbers[rows], batch.greedy[rows])
        logprobs[rows] = scores[rows].gather(1, tokens[rows, None])[:, 0] - log_norm[rows]
    return Sampled(tokens.tolist(), logprobs.tolist(), scores, log_norm)


def _draw(scores: Tensor, uniform: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.draw`."""
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp_()
    spans = _span_sums(weights)
    log_norm = (spans.sum(-1).log_() + peak[:, 0]).to(scores.dtype)
    tokens = _pick(weights, spans, uniform, greedy)
    return tokens, scores.gather(1, tokens[:, None])[:, 0] - log_norm, log_norm


def _pick(weights: Tensor, spans: Tensor, uniform: Tensor, greedy: Tensor) -> Tensor:
    if greedy.all():
        return weights.argmax(-1)
    tokens = _inverse_cdf(weights, spans, uniform)
    return torch.where(greedy > 0, weights.argmax(-1), tokens) if greedy.any() else tokens


def _span_sums(weights: Tensor) -> Tensor:
    """float64 `[B, spans]`: sums of `_SPAN` neighbouring weights. One vectorised pass instead of a serial cumsum."""
    rest = weights.shape[1] % _SPAN
    if rest:
        weights = torch.nn.functional.pad(weights, (0, _SPAN - rest))
    return weights.view(weights.shape[0], -1, _SPAN).sum(-1).double()


def _inverse_cdf(weights: Tensor, spans: Tensor, uniform: Tensor) -> Tensor:
    """int64 `[B]`: the first token whose cumulative weight exceeds uniform * total."""
    edges = spans.cumsum(-1)
    target = (uniform * edges[:, -1])[:, None]
    span = (edges <= target).sum(-1, keepdim=True)
    # Rounding may carry a target past the last weight: the last span, and in it the last token, that has any.
    span = torch.minimum(span, _last_positive(spans))
    before = edges.gather(1, span) - spans.gather(1, span)
    columns = span * _SPAN + torch.arange(_SPAN, device=weights.device)
    inside = weights.gather(1, columns.clamp_max(weights.shape[1] - 1)).double()
    inside.masked_fill_(columns >= weights.shape[1], 0.0)
    offset = (inside.cumsum(-1) <= target - before).sum(-1, keepdim=True)
    return (span * _SPAN + torch.minimum(offset, _last_positive(inside)))[:, 0]


def _last_positive(x: Tensor) -> Tensor:
    """int64 `[B, 1]`: the last column above 0."""
    return x.shape[1] - 1 - (x > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)


def _truncates(params: SamplingParams) -> bool:
    return params.temperature > 0 and (params.top_p < 1.0 or params.top_k > 0 or params.min_p > 0.0)


def _truncated(scores: Tensor, params: list[SamplingParams], banned: Tensor | None) -> Tensor:
    """Weights `[B, V]` that are 0 for tokens that may not be drawn."""
    if banned is not None:
        scores = scores.masked_fill(banned, -torch.inf)  # what is left sets the scale, however unlikely it was
    weights = torch.softmax(scores, -1)
    cut = [i for i, p in enumerate(params) if _truncates(p)]
    if cut:
        rows = torch.tensor(cut, device=weights.device)
        weights[rows] = _keep_likely(weights[rows], [params[i] for i in cut])
    return weights


def _keep_likely(weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """Apply `min_p`, then `top_k`, then `top_p` to weights `[B, V]`; ties at a threshold stay."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=weights.device)[:, None]

    vocabulary = weights.shape[1]
    ordered = weights.sort(-1, descending=True).values.double()
    k = column([p.top_k if p.top_k > 0 else vocabulary for p in params]).long().clamp_max(vocabulary)
    floor = torch.maximum(ordered.gather(1, k - 1), column([p.min_p for p in params]) * ordered[:, :1])
    ordered.masked_fill_(ordered < floor, 0.0)
    cumulative = ordered.cumsum(-1)
    # top_p keeps the fewest tokens that reach it: those before which less than top_p has been seen.
    needed = (cumulative - ordered) < column([p.top_p for p in params]) * cumulative[:, -1:]
    last = (needed.sum(-1, keepdim=True) - 1).clamp_min(0)
    floor = torch.maximum(floor, ordered.gather(1, last))
    return weights.masked_fill(weights.double() < floor, 0.0)
