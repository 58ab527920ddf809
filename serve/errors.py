"""What goes wrong with a request, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

RETRY_AFTER = {"Retry-After": "1"}


class ApiError(Exception):
    """An answer other than success. `type` and `code` are OpenAI's words; `param` names the offending field."""

    status = 500
    type = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class Unauthorized(ApiError):
    status = 401
    type = "authentication_error"


class NotFound(ApiError):
    status = 404
    type = "not_found_error"


class TooLarge(ApiError):
    status = 413
    type = "invalid_request_error"


class TooManyRequests(ApiError):
    status = 429
    type = "rate_limit_error"


class Unavailable(ApiError):
    """No replica can answer now."""

    status = 503
    type = "service_unavailable_error"


class TimedOut(ApiError):
    """The request did not end within its time."""

    status = 504
    type = "timeout_error"
