"""What is wrong with a request's body, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thornback.serve.errors import BadRequest

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unsupported": "unsupported_parameter",
    "json_invalid": "invalid_json",
}


def bad_request(errors: Sequence[dict[str, Any]]) -> BadRequest:
    """The first of pydantic's errors as OpenAI would tell it."""
    first = errors[0]
    kind = first["type"]
    place = [str(part) for part in first["loc"] if part not in ("body", "path", "query")]
    name = place[0] if place else None
    where = ".".join(place)
    # A union's errors lie below the names of its parts, which mean nothing to a client.
    if name is not None and len({tuple(e["loc"][:2]) for e in errors}) == 1 and len(errors) > 1:
        where = name
    if kind == "json_invalid":
        return BadRequest("The body is not valid JSON.", code=_CODES[kind])
    if name is None and kind in ("model_attributes_type", "model_type", "dict_type", "missing"):
        return BadRequest("The body must be a JSON object, sent as application/json.", code="invalid_json")
    if name is None:
        said = str(first["msg"]).removeprefix("Value error, ")
        return BadRequest(f"The request is not valid: {said}.", code="invalid_value")
    if kind == "missing":
        return BadRequest(f"{where} is missing.", param=name, code=_CODES[kind])
    if kind == "extra_forbidden":
        return BadRequest(f"There is no parameter {where}.", param=name, code=_CODES[kind])
    said = str(first["msg"]).removeprefix("Value error, ")
    if kind == "unsupported":
        return BadRequest(f"{where} {said}.", param=name, code=_CODES[kind])
    return BadRequest(f"{where} is not valid: {said}.", param=name, code="invalid_value")
