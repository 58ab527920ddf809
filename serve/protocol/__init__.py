"""OpenAI's protocol as pydantic models: what clients send, and what they get."""

from thornback.serve.protocol.chat import ChatMessage, ChatRequest, ToolDefinition
from thornback.serve.protocol.chat_response import (
    ChatChoice,
    ChatChoiceLogprobs,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatResponse,
    ChatResponseMessage,
    FunctionCall,
    FunctionCallDelta,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
)
from thornback.serve.protocol.common import ErrorResponse, Health, ModelCard, ModelList, Usage, UsageDetails
from thornback.serve.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)

__all__ = [
    "ChatChoice",
    "ChatChoiceLogprobs",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatDelta",
    "ChatMessage",
    "ChatRequest",
    "ChatResponse",
    "ChatResponseMessage",
    "CompletionChoice",
    "CompletionLogprobs",
    "CompletionRequest",
    "CompletionResponse",
    "ErrorResponse",
    "FunctionCall",
    "FunctionCallDelta",
    "Health",
    "ModelCard",
    "ModelList",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "ToolDefinition",
    "TopLogprob",
    "Usage",
    "UsageDetails",
]
