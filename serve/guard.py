"""What stands before the endpoints: API keys and the size of a body."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thornback.serve.errors import ApiError, TooLarge, Unauthorized
from thornback.serve.replies import error_response

GUARDED = ("/v1", "/update_weights")


class Guard:
    """Refuses requests below /v1, and those that change the server, without a key (if there are keys), and bodies that
    are too large."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], max_body_bytes: int) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            if self._keys and scope["path"].startswith(GUARDED):
                self._check_key(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, headers: Headers) -> None:
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        # Every key is compared, each in constant time: how long it takes says nothing.
        matches = [hmac.compare_digest(sent.strip().encode(), key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized(
                "This server asks for an API key: send one as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get("content-length", "0")
        parts: list[bytes] = []
        size = int(declared) if declared.isdigit() else 0
        more = size <= self._max_body_bytes
        received = 0
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            received += len(parts[-1])
            more = message.get("more_body", False) and received <= self._max_body_bytes
        if max(size, received) > self._max_body_bytes:
            raise TooLarge(f"The request's body is larger than the {self._max_body_bytes} bytes that are allowed.")
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body again, then what follows it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
