"""ASGI middleware in front of every route: authorization, the request's body, cancellation and the request log."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, final

from softprompt.serve.api.auth import AuthConfig, is_loopback
from softprompt.serve.api.errors import error_response
from softprompt.serve.engine.request import EngineRequest
from softprompt.serve.metrics import Metrics

_log = logging.getLogger("softprompt.serve.requests")
_PUBLIC = ("/", "/healthz", "/readyz", "/openapi.json")
"""Routes without a token: they reveal nothing about prompts or texts, and take no body."""
_UPLOADS = "/v1/prompts"
"""Routes below it take a body as large as a prompt's file."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
_STATUS_CLIENT_GONE = 499

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@final
@dataclass
class RequestRecord:
    """What is known about an HTTP request when it ends; routes fill it in."""

    prompt: str = ""
    """The name of the prompt that was asked for."""
    rows: int = 0
    """Rows that were asked for."""
    arrived: float = field(default_factory=time.monotonic)
    """When its body was complete; from then on its time counts."""
    requests: list[EngineRequest] = field(default_factory=list)
    """Cancelled when the HTTP request ends, however it ends."""
    texts: list[Any] = field(default_factory=list)
    """The inputs as they were sent, for a log with texts."""
    answers_per_input: int = 1
    """Requests for the same input are neighbors in `requests`."""

    @property
    def input_tokens(self) -> int:
        """Tokens of the inputs, each input counted once."""
        return sum(len(request.ids) for request in self.requests[:: self.answers_per_input])

    @property
    def output_tokens(self) -> int:
        """Tokens of the answers."""
        return sum(request.num_output_tokens for request in self.requests)


@final
class RequestMiddleware:
    """Reads a body in full before the application sees it: a body is small, or it is rejected."""

    def __init__(self, app: App, auth: AuthConfig, metrics: Metrics, log_texts: bool) -> None:
        self._app, self._auth, self._metrics, self._log_texts = app, auth, metrics, log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, and log and count it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, start, status = RequestRecord(), time.monotonic(), _STATUS_CLIENT_GONE
        scope["record"] = record

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            refusal = self._authorize(scope)
            if refusal is None:
                body, refusal = await self._read_body(scope, receive)
            if refusal is not None:
                await refusal(scope, receive, send_with_headers)
                return
            record.arrived = time.monotonic()
            await self._app(scope, _replay(body, receive), send_with_headers)
        except Exception:
            status = 500 if status == _STATUS_CLIENT_GONE else status  # answered outside of this middleware
            raise
        finally:
            for request in record.requests:
                request.cancel()
            self._log_request(scope, record, status, time.monotonic() - start)

    def _authorize(self, scope: Scope) -> Any:
        """The response that rejects the request, or None."""
        headers = dict(scope["headers"])
        auth, path = self._auth, scope["path"]
        if not auth.requires_token and (refusal := _check_origin(headers)) is not None:
            return refusal
        authorization = headers.get(b"authorization", b"")
        if path not in _PUBLIC and not auth.may_ask(authorization):
            return error_response(
                401,
                "a valid token is needed; send it as Authorization: Bearer TOKEN",
                "authentication_error",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )
        changes = path.startswith(_UPLOADS) and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and not auth.may_change(authorization):
            return error_response(
                403,
                "prompts cannot be changed with this token; start the service with one that may",
                "permission_error",
                "forbidden",
            )
        return None

    async def _read_body(self, scope: Scope, receive: Receive) -> tuple[bytes, Any]:
        """The body, and the response that rejects it or None."""
        max_size = self._auth.max_upload if scope["path"].startswith(_UPLOADS) else self._auth.max_body
        if scope["path"] in _PUBLIC:
            max_size = 0
        too_large = error_response(
            413,
            f"the request is larger than {max_size} bytes; send less at once",
            code="too_large",
            headers={"Connection": "close"},
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > max_size:
            return b"", too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._auth.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b"", error_response(
                            _STATUS_CLIENT_GONE, "the client disconnected", "cancelled", "cancelled"
                        )
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > max_size:
                        return b"", too_large
                    if not message.get("more_body"):
                        return b"".join(parts), None
        except TimeoutError:
            return b"", error_response(
                408,
                f"the request took longer than {self._auth.body_seconds:g} seconds to arrive; send it faster",
                "timeout",
                "timeout",
                {"Connection": "close"},
            )

    def _log_request(self, scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.observe_request(route, status, record.prompt, seconds, record.input_tokens, record.output_tokens)
        fields: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "prompt": record.prompt,
            "rows": record.rows,
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
        }
        if self._log_texts:
            fields["texts"] = record.texts
        _log.info("request", extra={"fields": fields})


def _check_origin(headers: Mapping[bytes, bytes]) -> Any:
    """The response that rejects a request which a page of another site may have sent, or None."""
    if not is_loopback(_host_name(headers.get(b"host", b""))):
        return error_response(
            421, "the service answers only to names of this machine; ask localhost, or start it with a token"
        )
    origin = headers.get(b"origin")
    if origin is not None and not is_loopback(_host_name(origin.partition(b"://")[2])):
        return error_response(
            403,
            "a page of another site may not send requests; open the service's own page, or start it with a token",
            "permission_error",
            "forbidden",
        )
    return None


def _host_name(host: bytes) -> str:
    """The host without its port."""
    text = host.decode("latin-1")
    return text.rsplit(":", 1)[0] if not text.endswith("]") else text


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body at once, then what the connection receives: that the client disconnects."""
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
