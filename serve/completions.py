"""`/v1/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from starlette.responses import Response

from thornback.serve.gateway import Gateway
from thornback.serve.generation import Piece
from thornback.serve.logprobs import CompletionScores, join_logprobs
from thornback.serve.protocol import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse
from thornback.serve.replies import Envelope, TokenCount, streamed, whole
from thornback.serve.sampling import sampling_params


async def complete(gateway: Gateway, request: CompletionRequest) -> Response:
    """Answer a completion request, whole or as a stream."""
    gateway.check_model(request.model)
    prompts = [await _token_ids(gateway, prompt) for prompt in request.prompts]
    # An answer of no tokens is the scoring of a prompt: one token is drawn, and dropped.
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    await gateway.check_prompts(prompts, request.n)
    sampling = sampling_params(
        request,
        max_tokens=max(max_tokens, 1),
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    job = _Completion(gateway, request, prompts, Envelope("cmpl", gateway.model_name))
    chunks = job.chunks(gateway.generate(prompts, sampling, request))
    if request.stream:
        return await streamed(chunks, job.envelope)
    return whole(await job.gather(chunks), job.envelope)


async def _token_ids(gateway: Gateway, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    return await asyncio.to_thread(gateway.text.encode, prompt)


@dataclass(slots=True)
class _Completion:
    """Makes chunks of pieces, and one answer of chunks."""

    gateway: Gateway
    request: CompletionRequest
    prompts: list[list[int]]
    envelope: Envelope

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[CompletionResponse, None]:
        """One choice a chunk; a last one without choices holds the usage, if it is wanted or nothing is streamed."""
        count = TokenCount(sum(map(len, self.prompts)))
        scores: dict[int, CompletionScores] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                self.envelope.weight_version = piece.weight_version
                if self.request.max_tokens == 0:
                    _drop_answer(piece)
                count.add(piece)
                number = piece.prompt_index * self.request.n + piece.index
                first = number not in scores
                if first:
                    scores[number] = CompletionScores(self.gateway.text)
                choice = self._choice(number, piece, scores[number], first)
                if choice.text or choice.logprobs or choice.finish_reason or first:
                    yield CompletionResponse(**self.envelope.fields(), object="text_completion", choices=[choice])
        if self.request.wants_usage or not self.request.stream:
            yield CompletionResponse(
                **self.envelope.fields(), object="text_completion", choices=[], usage=count.usage()
            )

    def _choice(self, number: int, piece: Piece, scores: CompletionScores, first: bool) -> CompletionChoice:
        text, logprobs = piece.text, None
        echoed = first and self.request.echo
        if echoed:
            prompt = self.request.prompts[piece.prompt_index]
            text = (prompt if isinstance(prompt, str) else self.gateway.text.decode(prompt)) + text
        if self.request.logprobs is not None:
            prompt_ids = self.prompts[piece.prompt_index] if echoed else ()
            logprobs = scores.add(prompt_ids, piece, self.request.logprobs)
        return CompletionChoice(
            index=number,
            text=text,
            logprobs=logprobs,
            finish_reason=_reason(piece),
            stop_reason=piece.stop_reason,
        )

    async def gather(self, chunks: AsyncGenerator[CompletionResponse, None]) -> CompletionResponse:
        """All chunks as one answer."""
        parts: dict[int, list[CompletionChoice]] = {}
        usage = None
        async with aclosing(chunks):
            async for chunk in chunks:
                for choice in chunk.choices:
                    parts.setdefault(choice.index, []).append(choice)
                usage = chunk.usage
        choices = [_joined(parts[number]) for number in sorted(parts)]
        return CompletionResponse(**self.envelope.fields(), choices=choices, usage=usage)


def _reason(piece: Piece) -> Literal["stop", "length"] | None:
    assert piece.finish_reason != "abort"  # only the gateway aborts, and it has left by then
    return piece.finish_reason


def _drop_answer(piece: Piece) -> None:
    piece.text, piece.token_ids, piece.logprobs = "", [], []
    piece.top_logprobs = None if piece.top_logprobs is None else []
    piece.finish_reason, piece.stop_reason = "length", None


def _joined(parts: list[CompletionChoice]) -> CompletionChoice:
    scored: list[CompletionLogprobs] = [part.logprobs for part in parts if part.logprobs is not None]
    return CompletionChoice(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        logprobs=join_logprobs(scored) if scored else None,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
    )
