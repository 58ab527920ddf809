"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from thornback.data.tool_calls import OPEN, CallArguments, CallStart, Content, Event, ToolCallParser
from thornback.serve.chat_prompt import render_chat
from thornback.serve.gateway import Gateway
from thornback.serve.generation import Piece
from thornback.serve.logprobs import chat_logprobs
from thornback.serve.protocol import (
    ChatChoice,
    ChatChoiceLogprobs,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatRequest,
    ChatResponse,
    ChatResponseMessage,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from thornback.serve.protocol.chat import JsonSchemaFormat, NamedTool
from thornback.serve.protocol.chat_response import ChatFinishReason
from thornback.serve.replies import Envelope, TokenCount, streamed, whole
from thornback.serve.sampling import sampling_params
from thornback.serve.tool_schemas import call_schema


async def chat(gateway: Gateway, request: ChatRequest) -> Response:
    """Answer a chat request, whole or as a stream."""
    gateway.check_model(request.model)
    prompt = await asyncio.to_thread(render_chat, gateway.text, request)
    if _forces_call(request):
        # The call begins in the prompt, as the model has learnt to write it; the schema does the rest.
        prompt += gateway.text.encode_part(OPEN + "\n")
    engine = await gateway.description()
    await gateway.check_prompts([prompt], request.n)
    sampling = sampling_params(
        request,
        max_tokens=request.token_limit or engine.max_model_len - len(prompt),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        json_schema=_schema(request),
    )
    job = _Chat(gateway, request, len(prompt), Envelope("chatcmpl", gateway.model_name))
    chunks = job.chunks(gateway.generate([prompt], sampling, request))
    if request.stream:
        return await streamed(chunks, job.envelope)
    return whole(await job.gather(chunks), job.envelope)


def _forces_call(request: ChatRequest) -> bool:
    return request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)


def _schema(request: ChatRequest) -> str | None:
    """What the answer must follow: a tool's call, or the response format."""
    choice, wanted = request.tool_choice, request.response_format
    if isinstance(choice, NamedTool):
        return call_schema([tool for tool in request.tools or () if tool.function.name == choice.function.name])
    if choice == "required":
        return call_schema(request.tools or ())
    if isinstance(wanted, JsonSchemaFormat):
        return json.dumps(wanted.json_schema.schema_)
    if wanted is not None and wanted.type == "json_object":
        return '{"type": "object"}'
    return None


@dataclass(slots=True)
class _Chat:
    """Makes chunks of pieces, and one answer of chunks."""

    gateway: Gateway
    request: ChatRequest
    num_prompt_tokens: int
    envelope: Envelope

    def _parser(self) -> ToolCallParser | None:
        """None: all text is content."""
        if not self.request.tools or self.request.tool_choice == "none":
            return None
        single = self.request.parallel_tool_calls is False
        return ToolCallParser(inside=_forces_call(self.request), max_calls=1 if single else None)

    async def chunks(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[ChatChunk, None]:
        """One choice a chunk; a last one without choices holds the usage, if it is wanted or nothing is streamed."""
        count = TokenCount(self.num_prompt_tokens)
        parsers: dict[int, ToolCallParser | None] = {}
        async with aclosing(pieces):
            async for piece in pieces:
                self.envelope.weight_version = piece.weight_version
                count.add(piece)
                if piece.index not in parsers:
                    parsers[piece.index] = self._parser()
                    yield self._chunk(
                        ChatChunkChoice(
                            index=piece.index, delta=ChatDelta(role="assistant", content=""), finish_reason=None
                        )
                    )
                for choice in self._choices(piece, parsers[piece.index]):
                    yield self._chunk(choice)
        if self.request.wants_usage or not self.request.stream:
            yield self._chunk(None, count.usage())

    def _chunk(self, choice: ChatChunkChoice | None, usage: Usage | None = None) -> ChatChunk:
        choices = [choice] if choice else []
        extra: dict[str, Any] = {"usage": usage} if usage else {}
        return ChatChunk(**self.envelope.fields(), object="chat.completion.chunk", choices=choices, **extra)

    def _choices(self, piece: Piece, parser: ToolCallParser | None) -> list[ChatChunkChoice]:
        """The deltas of a piece; its log-probabilities go with the first, its end with a last one of its own."""
        deltas = [_delta(event) for event in _events(piece, parser)]
        logprobs = None
        if self.request.logprobs and piece.token_ids:
            logprobs = chat_logprobs(self.gateway.text, piece, self.request.top_logprobs or 0)
            deltas = deltas or [ChatDelta(content="")]
        choices = []
        for i, delta in enumerate(deltas):
            extra: dict[str, Any] = {"logprobs": logprobs} if logprobs and i == 0 else {}
            choices.append(ChatChunkChoice(index=piece.index, delta=delta, finish_reason=None, **extra))
        if piece.finish_reason is not None:
            end = ChatDelta()
            reason = _reason(piece, parser)
            choices.append(
                ChatChunkChoice(index=piece.index, delta=end, finish_reason=reason, stop_reason=piece.stop_reason)
            )
        return choices

    async def gather(self, chunks: AsyncGenerator[ChatChunk, None]) -> ChatResponse:
        """All chunks as one answer."""
        gathered: dict[int, _Gathered] = {}
        usage = None
        async with aclosing(chunks):
            async for chunk in chunks:
                for choice in chunk.choices:
                    gathered.setdefault(choice.index, _Gathered()).add(choice)
                usage = chunk.usage
        assert usage is not None
        choices = [gathered[index].choice(index) for index in sorted(gathered)]
        return ChatResponse(**self.envelope.fields(), choices=choices, usage=usage)


def _reason(piece: Piece, parser: ToolCallParser | None) -> ChatFinishReason | None:
    assert piece.finish_reason != "abort"  # only the gateway aborts, and it has left by then
    if piece.finish_reason == "stop" and parser is not None and parser.num_calls:
        return "tool_calls"
    return piece.finish_reason


def _events(piece: Piece, parser: ToolCallParser | None) -> list[Event]:
    if parser is None:
        return [Content(piece.text)] if piece.text else []
    events = parser.push(piece.text)
    if piece.finish_reason is not None:
        events += parser.flush()
    return events


def _delta(event: Event) -> ChatDelta:
    match event:
        case Content(text):
            return ChatDelta(content=text)
        case CallStart(index, call_id, name):
            function = FunctionCallDelta(name=name, arguments="")
            return ChatDelta(tool_calls=[ToolCallDelta(index=index, id=call_id, type="function", function=function)])
        case CallArguments(index, text):
            return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=FunctionCallDelta(arguments=text))])


class _Gathered:
    """One choice of a whole answer, put together from deltas."""

    def __init__(self) -> None:
        self._content = ""
        self._calls: list[ToolCall] = []
        self._scores: ChatChoiceLogprobs | None = None
        self._last: ChatChunkChoice | None = None

    def add(self, choice: ChatChunkChoice) -> None:
        self._content += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            if part.id is not None:
                function = FunctionCall(name=part.function.name or "", arguments="")
                self._calls.append(ToolCall(id=part.id, type="function", function=function))
            self._calls[part.index].function.arguments += part.function.arguments or ""
        if choice.logprobs is not None:
            self._scores = self._scores or ChatChoiceLogprobs(content=[])
            self._scores.content += choice.logprobs.content
        self._last = choice

    def choice(self, index: int) -> ChatChoice:
        assert self._last is not None
        assert self._last.finish_reason is not None
        content = None if self._calls and not self._content else self._content
        return ChatChoice(
            index=index,
            message=ChatResponseMessage(content=content, tool_calls=self._calls or None),
            logprobs=self._scores,
            finish_reason=self._last.finish_reason,
            stop_reason=self._last.stop_reason,
        )
