"""One prompt's way through a replica, as text: pieces of samples, cut at stop strings."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from thornback.contracts import FinishReason, Output, Request
from thornback.serve.detokenizer import Detokenizer
from thornback.serve.limits import Deadlines
from thornback.serve.metrics import Metrics
from thornback.serve.pool import ReplicaPool
from thornback.serve.stop_strings import StopStrings
from thornback.serve.text import Text


@dataclass(slots=True)
class Piece:
    """What came of one sample. `token_ids` and `logprobs` are all its new tokens; `text` may lag behind them."""

    prompt_index: int
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    weight_version: int
    num_cached_tokens: int = 0
    prompt_logprobs: list | None = None


@dataclass(slots=True)
class _Sample:
    """Text of one sample. Stop strings are looked for after `min_tokens` tokens."""

    request: Request
    detokenizer: Detokenizer
    stops: StopStrings
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    last_time: float = field(default_factory=time.monotonic)

    def push(self, output: Output) -> str:
        """The text that the new tokens complete. A token that ended the sample is not shown."""
        tokens = output.token_ids
        self.finish_reason = output.finish_reason
        if output.finish_reason == "stop":
            if tokens[-1] in self.request.sampling.stop_token_ids:
                self.stop_reason = tokens[-1]
            tokens = tokens[:-1]
        free = max(0, self.request.sampling.min_tokens - self.num_tokens)
        self.num_tokens += len(output.token_ids)
        text = self.detokenizer.push(tokens[:free]) if free else ""
        rest = self.detokenizer.push(tokens[free:]) if tokens[free:] else ""
        if output.finish_reason is not None:
            rest += self.detokenizer.flush()
        text += self.stops.push(rest)
        if self.stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self.stops.found
        elif output.finish_reason is not None:
            text += self.stops.flush()
        return text


async def generate_pieces(
    pool: ReplicaPool,
    text: Text,
    request: Request,
    prompt_index: int,
    metrics: Metrics,
    *,
    streaming: bool,
    deadlines: Deadlines,
) -> AsyncGenerator[Piece, None]:
    """Pieces of the samples of one request, until all have ended. Leaving the iterator aborts the request."""
    sampling = request.sampling
    samples = [_Sample(request, Detokenizer(text.decode), StopStrings(sampling.stop)) for _ in range(sampling.n)]
    # Stop strings end a request early, so its text must be looked at as it comes.
    outputs = pool.generate(request, streaming or bool(sampling.stop), deadlines)
    clock = metrics.request_clock(len(request.prompt_token_ids))
    try:
        async for items in outputs:
            for output in items:
                sample = samples[output.index]
                if sample.finish_reason is not None:
                    continue  # it met a stop string; its siblings go on
                shown = sample.push(output)
                clock.tokens(output.index, len(output.token_ids))
                if sample.finish_reason is not None:
                    clock.finished(sample.finish_reason, sample.num_tokens)
                yield _piece(prompt_index, sample, output, shown)
            if all(sample.finish_reason is not None for sample in samples):
                return
    finally:
        await outputs.aclose()
        clock.close()


def _piece(prompt_index: int, sample: _Sample, output: Output, shown: str) -> Piece:
    return Piece(
        prompt_index=prompt_index,
        index=output.index,
        text=shown,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        top_logprobs=output.top_logprobs,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        weight_version=output.weight_version,
        num_cached_tokens=output.num_cached_tokens,
        prompt_logprobs=output.prompt_logprobs,
    )
