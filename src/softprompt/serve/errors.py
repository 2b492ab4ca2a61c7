"""What goes wrong, in OpenAI's shape."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from softprompt.serve.ticket import Cancelled, Closed, Full, Unknown

_KINDS: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (Full, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Closed, 503, "server_error", "shutting_down"),
    (Unknown, 404, "invalid_request_error", "model_not_found"),
    (TimeoutError, 504, "timeout", "timeout"),
    (Cancelled, 499, "cancelled", "cancelled"),
    (FileExistsError, 409, "invalid_request_error", "conflict"),
    (PermissionError, 403, "permission_error", "forbidden"),
    (FloatingPointError, 500, "server_error", "overflow"),
    (ValueError, 400, "invalid_request_error", None),
)
EXPECTED: tuple[type[BaseException], ...] = tuple(kind for kind, *_ in _KINDS)
"""What a client can be told in its own words; anything else is our fault, and only the log says what."""


def body_of(message: str, kind: str, code: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    # A lone surrogate in what the client sent cannot be written as UTF-8.
    text = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def answer(
    status: int,
    message: str,
    kind: str = "invalid_request_error",
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response that says it."""
    return JSONResponse(body_of(message, kind, code), status, dict(headers or {}))


def described(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers."""
    if isinstance(error, RequestValidationError):
        return 400, body_of(_validation(error), "invalid_request_error", "invalid"), {}
    if isinstance(error, HTTPException):
        return error.status_code, body_of(str(error.detail), "invalid_request_error", None), dict(error.headers or {})
    for known, status, kind, code in _KINDS:
        if isinstance(error, known):
            headers = {"Retry-After": str(math.ceil(error.after))} if isinstance(error, Full) else {}
            return status, body_of(" ".join(str(error).split()), kind, code), headers
    return 500, body_of("the request failed inside the service; its log says why", "server_error", "internal"), {}


def response(error: BaseException) -> JSONResponse:
    """The response that says it."""
    status, body, headers = described(error)
    return JSONResponse(body, status, headers)


def _validation(error: RequestValidationError) -> str:
    """The first thing that is wrong; what was sent is not repeated."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first.get("loc", ()) if part != "body")[:200]
    reason = str(first.get("msg", "it cannot be read"))[:300]
    return f"{place}: {reason}" if place else reason
