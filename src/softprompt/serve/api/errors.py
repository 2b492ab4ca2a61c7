"""Errors as HTTP responses in OpenAI's format."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from softprompt.files import error_text
from softprompt.serve.engine.request import (
    Cancelled,
    EngineClosed,
    EngineUnavailable,
    InvalidParameter,
    PromptNotFound,
    QueueFull,
)

_RESPONSES: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (QueueFull, 429, "rate_limit_error", "rate_limit_exceeded"),
    (EngineClosed, 503, "server_error", "shutting_down"),
    (EngineUnavailable, 503, "server_error", "engine_unavailable"),
    (PromptNotFound, 404, "invalid_request_error", "model_not_found"),
    (TimeoutError, 504, "timeout", "timeout"),
    (Cancelled, 499, "cancelled", "cancelled"),
    (FileExistsError, 409, "invalid_request_error", "conflict"),
    (PermissionError, 403, "permission_error", "forbidden"),
    (FloatingPointError, 500, "server_error", "overflow"),
    (ValueError, 400, "invalid_request_error", None),
)
"""Status, type and code of each error; the first class that matches counts."""
EXPECTED: tuple[type[BaseException], ...] = tuple(error for error, *_ in _RESPONSES)
"""Errors whose message clients see. Any other is a bug, and only the log has its message."""

_TYPE_NAMES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""The expected type behind pydantic's errors for a value of the wrong type."""


def error_response(
    status: int,
    message: str,
    type_: str = "invalid_request_error",
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A response with an error in OpenAI's format."""
    return JSONResponse(_error_body(message, type_, code), status, dict(headers or {}))


def explain(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of the response to an exception."""
    if isinstance(error, RequestValidationError):
        return 400, _validation_body(error), {}
    if isinstance(error, HTTPException):
        body = _error_body(str(error.detail), "invalid_request_error", None)
        return error.status_code, body, dict(error.headers or {})
    for expected, status, type_, code in _RESPONSES:
        if isinstance(error, expected):
            headers = {"Retry-After": str(math.ceil(error.retry_after))} if isinstance(error, QueueFull) else {}
            param = error.param if isinstance(error, InvalidParameter) else None
            return status, _error_body(error_text(error), type_, code, param), headers
    return 500, _error_body("the request failed in the service; see its log", "server_error", "internal"), {}


async def handle_error(_: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler of every exception."""
    status, body, headers = explain(error)
    return JSONResponse(body, status, headers)


def _error_body(message: str, type_: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    # A message may quote what the client sent, and a lone surrogate cannot be written as UTF-8.
    text = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": text, "type": type_, "param": param, "code": code}}


def _validation_body(error: RequestValidationError) -> dict[str, Any]:
    """The first problem of a body, without quoting it.

    Where a field may have several types, pydantic reports one error per type; the one that helps is of the type that
    matches furthest into the body.
    """
    problems = error.errors()
    if problems[0].get("type") == "json_invalid":
        reason = str(problems[0].get("ctx", {}).get("error", "it cannot be read"))
        message = f"the body is not JSON: {reason} at character {problems[0]['loc'][-1]}"
        return _error_body(message, "invalid_request_error", "invalid")
    located = [(problem, _location(problem, error.body)) for problem in problems]
    first_field = located[0][1][:1]
    located = [(problem, location) for problem, location in located if location[:1] == first_field]
    furthest = max(_progress(location) for _, location in located)
    located = [(problem, location) for problem, location in located if _progress(location) == furthest]
    types = [_TYPE_NAMES.get(problem["type"]) for problem, _ in located]
    # A value of the right type that is wrong otherwise says more than one of the wrong type.
    problem, location = located[types.index(None) if None in types else 0]
    reason = str(problem.get("msg", "it cannot be read")).removeprefix("Value error, ")[:300]
    names = list(dict.fromkeys(name for name in types if name is not None))
    if None not in types and len(names) > 1:
        reason = f"Input should be {', '.join(names[:-1])} or {names[-1]}"
    field = ".".join(map(str, location))[:200]
    message = f"{field}: {reason}" if field else reason
    if problem["type"] != "unsupported_parameter":
        return _error_body(message, "invalid_request_error", "invalid", field or None)
    name = problem["ctx"]["field"]
    return _error_body(message, "invalid_request_error", "unsupported_parameter", f"{field}.{name}" if field else name)


def _location(problem: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body a problem is, without the names of the types that pydantic tried."""
    parts = [part for part in problem.get("loc", ()) if part != "body"]
    location: list[str | int] = []
    for number, part in enumerate(parts, start=1):
        exists = (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        )
        if exists:
            body = body[part]
        if exists or not location or (problem.get("type") == "missing" and number == len(parts)):
            location.append(part)
    return tuple(location)


def _progress(location: Sequence[str | int]) -> tuple[int, tuple[int, ...]]:
    """Sort key for how far the body matched: by how deep it is, then by position in its lists."""
    return len(location), tuple(part for part in location if isinstance(part, int))
