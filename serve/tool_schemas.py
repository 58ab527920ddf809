"""JSON schemas that make a model call a tool."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from thornback.serve.protocol import ToolDefinition


def call_schema(tools: Sequence[ToolDefinition]) -> str:
    """The schema of a call of one of `tools`: an object with a name and the arguments that this tool takes."""
    if len(tools) == 1:
        return json.dumps(_one(tools[0], "#"))
    return json.dumps({"anyOf": [_one(tool, f"#/anyOf/{i}") for i, tool in enumerate(tools)]})


def _one(tool: ToolDefinition, place: str) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": _moved({"type": "object", **parameters}, f"{place}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema that now stands at `place`: references from its root are made to start there."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
