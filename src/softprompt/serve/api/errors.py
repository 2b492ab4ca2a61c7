"""What goes wrong, in OpenAI's shape."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from softprompt.serve.engine.request import Cancelled, EngineClosed, PromptNotFound, QueueFull

_KINDS: tuple[tuple[type[BaseException], int, str, str | None], ...] = (
    (QueueFull, 429, "rate_limit_error", "rate_limit_exceeded"),
    (EngineClosed, 503, "server_error", "shutting_down"),
    (PromptNotFound, 404, "invalid_request_error", "model_not_found"),
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
            headers = {"Retry-After": str(math.ceil(error.after))} if isinstance(error, QueueFull) else {}
            return status, body_of(" ".join(str(error).split()), kind, code), headers
    return 500, body_of("the request failed inside the service; its log says why", "server_error", "internal"), {}


def response(error: BaseException) -> JSONResponse:
    """The response that says it."""
    status, body, headers = described(error)
    return JSONResponse(body, status, headers)


_KINDS_OF_VALUE = {
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
"""pydantic's errors of a value of another kind, as which a field of several kinds gives one for each."""


def _validation(error: RequestValidationError) -> str:
    """The first thing that is wrong; what was sent is not repeated.

    Where a field may be of several kinds, pydantic tells of each why it is none; the error that counts is that of the
    kind which fits the body furthest.
    """
    whole = error.errors()
    if whole[0].get("type") == "json_invalid":
        reason = str(whole[0].get("ctx", {}).get("error", "it cannot be read"))
        return f"the body is not JSON: {reason} at character {whole[0]['loc'][-1]}"
    places = [_place(one, error.body) for one in whole]
    first = places[0][:1]
    about = [(one, place) for one, place in zip(whole, places, strict=True) if place[:1] == first]
    furthest = max((_progress(place) for _, place in about))
    about = [(one, place) for one, place in about if _progress(place) == furthest]
    kinds = [_KINDS_OF_VALUE.get(one["type"]) for one, _ in about]
    at = next((at for at, kind in enumerate(kinds) if kind is None), 0)  # a value of the right kind, otherwise wrong
    reason = str(about[at][0].get("msg", "it cannot be read")).removeprefix("Value error, ")[:300]
    if None not in kinds and len(wanted := list(dict.fromkeys(map(str, kinds)))) > 1:
        reason = f"Input should be {', '.join(wanted[:-1])} or {wanted[-1]}"
    name = ".".join(map(str, about[at][1]))[:200]
    return f"{name}: {reason}" if name else reason


def _place(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where in the body an error is, without the names of the kinds that pydantic tried."""
    parts = [part for part in error.get("loc", ()) if part != "body"]
    found: list[str | int] = []
    for number, part in enumerate(parts, start=1):
        inside = (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        )
        if inside:
            body = body[part]
        if inside or not found or (error.get("type") == "missing" and number == len(parts)):
            found.append(part)
    return tuple(found)


def _progress(place: Sequence[str | int]) -> tuple[int, tuple[int, ...]]:
    """How far the body was read: the deeper the further, and in a list the later."""
    return len(place), tuple(part for part in place if isinstance(part, int))
