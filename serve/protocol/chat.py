"""`/v1/chat/completions`: what is sent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from thornback.serve.protocol.common import MAX_LOGPROBS, GenerationRequest, Int, Strict, only


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str


class CalledTool(Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Int | None = None


class ChatMessage(Strict):
    """One turn. `content` in parts is joined; only text parts are known."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    # Null in messages that a client sends back as it got them.
    refusal: only(None) = None  # type: ignore[valid-type]
    annotations: only(None, []) = None  # type: ignore[valid-type]
    audio: only(None) = None  # type: ignore[valid-type]
    function_call: only(None) = None  # type: ignore[valid-type]

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(Strict):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Strict):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"] = "function"
    function: NamedFunction


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatRequest(GenerationRequest):
    """A conversation to be continued by the assistant."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_tokens: Int | None = Field(default=None, ge=1, le=1 << 31)
    max_completion_tokens: Int | None = Field(default=None, ge=1, le=1 << 31)
    logprobs: bool | None = False
    top_logprobs: Int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[ToolDefinition], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: only(None, False) = None  # type: ignore[valid-type]
    modalities: only(None, ["text"]) = None  # type: ignore[valid-type]
    reasoning_effort: only(None) = None  # type: ignore[valid-type]
    verbosity: only(None) = None  # type: ignore[valid-type]
    audio: only(None) = None  # type: ignore[valid-type]
    prediction: only(None) = None  # type: ignore[valid-type]
    web_search_options: only(None) = None  # type: ignore[valid-type]
    functions: only(None) = None  # type: ignore[valid-type]
    function_call: only(None) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        wants_tools = self.tool_choice not in (None, "none", "auto")
        if wants_tools and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.tool_names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is not among the tools")
        if wants_tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("a required tool call leaves no room for a response_format: give one of them")
        return self

    @property
    def tool_names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    @property
    def token_limit(self) -> int | None:
        """Both names are upper bounds: both are kept. None: the model's context is the limit."""
        return min(filter(None, (self.max_tokens, self.max_completion_tokens)), default=None)
