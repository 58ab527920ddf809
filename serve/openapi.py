"""The API's own description: what FastAPI derives, less what it assumes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from thornback.serve.guard import GUARDED
from thornback.serve.protocol import ErrorResponse
from thornback.serve.replies import VERSION_HEADER

_MEANING = {
    400: "The request is wrong.",
    401: "An API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The server is full; `Retry-After` says when to try again.",
    503: "No replica can answer now.",
    504: "The answer took too long.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}

_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk as JSON; in the last event: [DONE]."}},
    "required": ["data"],
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's entry for each error status."""
    table: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        table[status] = {"model": ErrorResponse, "description": _MEANING[status]}
        if status in (429, 503):
            table[status]["headers"] = _RETRY
    return table


def generation_responses(answer: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Those of an endpoint that generates, which may also answer with events."""
    table = responses(*_MEANING)
    table[200] = {
        "model": answer,
        "description": "The answer; with `stream`, a stream of chunks.",
        "content": {"text/event-stream": {"schema": _EVENT}},
        "headers": {VERSION_HEADER: {"description": "The version of the weights.", "schema": {"type": "string"}}},
    }
    return table


def describe_api(app: FastAPI, model: str, with_keys: bool) -> None:
    """Replace the application's description by a true one: no 422, the model's name, and keys where there are some."""

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version="1", description=app.description, routes=app.routes)
            _without_422(schema)
            _with_model(schema, model)
            if with_keys:
                _with_keys(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]


def _operations(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(path, operation) for path, methods in schema["paths"].items() for operation in methods.values()]


def _without_422(schema: dict[str, Any]) -> None:
    for _, operation in _operations(schema):
        operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def _with_model(schema: dict[str, Any], model: str) -> None:
    for request in ("ChatRequest", "CompletionRequest"):
        schema["components"]["schemas"][request]["properties"]["model"] = {"type": "string", "enum": [model]}


def _with_keys(schema: dict[str, Any]) -> None:
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(schema):
        if path.startswith(GUARDED):
            operation["security"] = [{"key": []}]
