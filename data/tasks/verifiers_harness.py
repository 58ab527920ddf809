"""The chat loop of an agent in the `verifiers` library: the model answers, its calls of tools are made, until there are
none. It is the library's harness `null`, in this process: that one installs and starts a program for each episode.

Imported only where the library is installed.
"""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.compaction import bound_tool_message
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["ChatHarness"]  # the library takes the one harness that is named here

HARNESS = "thornback_chat_harness"
# The library finds harnesses by the names of modules at the top level, where ours is not.
sys.modules.setdefault(HARNESS, sys.modules[__name__])


def opening(data: vf.TaskData) -> list[vf.Message]:
    """What the model is asked first."""
    system = [] if data.system_prompt is None else [vf.SystemMessage(content=data.system_prompt)]
    prompt = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else data.prompt or []
    return [*system, *prompt]


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Of one episode: every request goes through the library's own server, which keeps the record that it judges."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    SUPPORTS_TOOL_INTERCEPTION = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
        tool_interception_url: str | None = None,
    ) -> vf.ProgramResult:
        messages = [message_to_wire(message) for message in opening(data)]
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            # No deadline: the model may answer a whole batch first. Who drives the episode has one, and cancels this.
            http = httpx.AsyncClient(headers={"Authorization": f"Bearer {secret}"}, timeout=None, trust_env=False)
            await stack.enter_async_context(http)
            tools, *mcp = await connect_mcp({"mcpServers": servers}, stack)
            request: dict[str, Any] = {"model": ctx.model, "messages": messages} | ({"tools": tools} if tools else {})
            while True:
                answer = (await http.post(f"{endpoint}/chat/completions", json=request)).raise_for_status().json()
                message = answer["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in message["tool_calls"]:
                    denied = await _denied(http, tool_interception_url, call)
                    messages.append(denied or bound_tool_message(await _result(call, *mcp)))


async def _denied(http: httpx.AsyncClient, gate: str | None, call: dict[str, Any]) -> dict[str, Any] | None:
    """What the environment says in place of a call's result; None: it may be made."""
    if gate is None:
        return None
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = function["arguments"]
    asked = {"tool_call_id": call["id"], "name": function["name"], "arguments": arguments}
    decision = (await http.post(gate, json=asked)).raise_for_status().json()
    if decision["action"] == "stop":
        raise RuntimeError(decision["reason"])
    return bound_tool_message(decision["message"]) if decision["action"] == "deny" else None


async def _result(call: dict[str, Any], dispatch: dict, servers: dict) -> dict[str, Any]:
    """The message that answers a call; its words for what is no call are those of the library's `null`."""
    name = call["function"]["name"]
    content: Any
    try:
        arguments = json.loads(call["function"]["arguments"] or "{}")
    except ValueError as error:
        content = f"error: invalid JSON in tool arguments ({error}); resend the call with valid JSON"
    else:
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            content = f"error: tool arguments must be a JSON object, got {kind}; resend as an object"
        elif name not in dispatch:
            content = f"error: unknown tool {name!r}"
        else:
            content = await call_mcp(servers, dispatch, name, arguments)
    return {"role": "tool", "tool_call_id": call["id"], "content": content, "name": name}
