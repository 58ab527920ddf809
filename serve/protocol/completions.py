"""`/v1/completions`: what is sent and what is answered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from thornback.serve.protocol.common import MAX_LOGPROBS, GenerationRequest, Int, TokenId, Usage, only

Prompt = Annotated[str, Field(min_length=1)]
Prompts = Annotated[list[Prompt], Field(min_length=1, max_length=4096)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenIdPrompts = Annotated[list[TokenIds], Field(min_length=1, max_length=4096)]


class CompletionRequest(GenerationRequest):
    """A prompt (text or token ids) or several, to be continued."""

    prompt: Prompt | Prompts | TokenIds | TokenIdPrompts
    max_tokens: Int | None = Field(default=16, ge=0, le=1 << 31)
    logprobs: Int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    best_of: only(None, 1) = None  # type: ignore[valid-type]
    suffix: only(None, "") = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which needs echo: there is nothing to answer")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[return-value]
        return self.prompt


class CompletionLogprobs(BaseModel):
    """One entry a token; the prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None


class CompletionResponse(BaseModel):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
