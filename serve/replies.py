"""How answers leave: whole, or as a stream of events; each names the weights that gave it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from thornback.serve.errors import ApiError
from thornback.serve.generation import Piece
from thornback.serve.protocol import Usage, UsageDetails

VERSION_HEADER = "x-thornback-weight-version"


@dataclass(slots=True)
class Envelope:
    """What every chunk of an answer repeats."""

    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    weight_version: int = 0
    response_id: str = ""

    def __post_init__(self) -> None:
        self.response_id = f"{self.kind}-{uuid.uuid4().hex}"

    def fields(self) -> dict:
        return {
            "id": self.response_id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"weights-{self.weight_version}",
        }


class TokenCount:
    """Counts the tokens of an answer as its pieces pass."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._prompt = num_prompt_tokens
        self._completion = 0
        self._cached: dict[int, int] = {}

    def add(self, piece: Piece) -> None:
        self._completion += len(piece.token_ids)
        if piece.index == 0:
            self._cached.setdefault(piece.prompt_index, piece.num_cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self._prompt + self._completion,
            prompt_tokens_details=UsageDetails(cached_tokens=sum(self._cached.values())),
        )


def whole(answer: BaseModel, envelope: Envelope) -> Response:
    return Response(
        answer.model_dump_json(),
        media_type="application/json",
        headers={VERSION_HEADER: str(envelope.weight_version)},
    )


def error_response(error: ApiError) -> Response:
    # ASCII only: a message may quote what is no valid text.
    return Response(json.dumps(error.body()), error.status, error.headers, media_type="application/json")


async def streamed(chunks: AsyncGenerator[BaseModel, None], envelope: Envelope) -> Response:
    """A response that sends `chunks` as server-sent events.

    The first is waited for here, so that what goes wrong before it is an HTTP error and not an event.
    """
    try:
        first = await anext(chunks)
    except BaseException:
        await chunks.aclose()
        raise

    async def events() -> AsyncIterator[str]:
        yield _event(first)
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        yield "data: [DONE]\n\n"

    return _EventStream(events(), chunks, {VERSION_HEADER: str(envelope.weight_version)})


def _event(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


class _EventStream(StreamingResponse):
    """Closes its source however it ends, so that a client that leaves frees the engine at once."""

    def __init__(self, events: AsyncIterator[str], source: AsyncGenerator, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            await self._source.aclose()
