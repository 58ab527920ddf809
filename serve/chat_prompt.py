"""A conversation as the token ids that its model's chat template makes of it."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError

from thornback.serve.errors import BadRequest
from thornback.serve.protocol import ChatMessage, ChatRequest
from thornback.serve.text import Text


def render_chat(text: Text, request: ChatRequest) -> list[int]:
    """Token ids of the prompt. Raises `BadRequest` for what the model's template cannot say."""
    tools = None
    if request.tools and request.tool_choice != "none":
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    template = _template(text, tools)
    if tools and "tools" not in template:
        raise BadRequest("This model's chat template has no place for tools.", param="tools")
    if "tool_calls" not in template and any(message.tool_calls for message in request.messages):
        raise BadRequest("This model's chat template has no place for tool calls.", param="messages")
    try:
        rendered: Any = text.tokenizer.apply_chat_template(
            [_plain(message) for message in request.messages],
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
            **_template_arguments(request),
        )
    except (TemplateError, TypeError, KeyError) as error:
        raise BadRequest(f"The model's chat template refuses these messages: {error}", param="messages") from error
    return text.encode_part(rendered)


def _template(text: Text, tools: list | None) -> str:
    try:
        return str(text.tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise BadRequest("This model has no chat template: use /v1/completions.", param="messages") from error


def _template_arguments(request: ChatRequest) -> dict[str, Any]:
    arguments = request.chat_template_kwargs or {}
    taken = {"tools", "add_generation_prompt", "tokenize", "conversation", "messages", "chat_template"}
    for name in arguments:
        if name in taken or name.startswith("return_"):
            raise BadRequest(f"chat_template_kwargs cannot set {name}.", param="chat_template_kwargs")
    return arguments


def _plain(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it: text content, arguments as objects, "developer" under its older name."""
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(written: str) -> Any:
    try:
        return json.loads(written or "{}")
    except ValueError:
        return written
