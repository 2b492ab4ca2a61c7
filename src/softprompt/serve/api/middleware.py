"""What stands in front of every request: who may ask, how much may be sent and how slowly, and what the log keeps."""

import asyncio
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, final

from softprompt.serve.api.errors import answer
from softprompt.serve.engine.request import EngineRequest
from softprompt.serve.metrics import Metrics

_log = logging.getLogger("softprompt.serve.requests")
_OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
"""What may be read without a token: nothing that says anything of prompts or texts, and nothing that takes a body."""
UPLOADS = "/v1/prompts"
"""Below it a body may be as large as a prompt's file."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@final
@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Who may ask and how much.

    Tokens are read as bytes and compared in constant time. Without any, whoever reaches the service may ask, nobody may
    change prompts, only names of this machine are answered (else a page in a browser could rebind its own name), and no
    page of another site.

    Raises:
        ValueError: a token is empty, which whoever sends none would bring.
    """

    tokens: tuple[str, ...] = ()
    """Whoever brings one may ask; and change prompts, where there are no tokens for that."""
    admin_tokens: tuple[str, ...] = ()
    """Whoever brings one may also add, replace and remove prompts."""
    max_body: int = 4 << 20
    """Bytes of a request."""
    max_upload: int = 64 << 20
    """Bytes of a prompt's file."""
    body_seconds: float = 30.0
    """How long sending a request may take."""
    changes: bool = True
    """Whether prompts can be changed at all."""

    def __post_init__(self) -> None:
        if not all(token.strip() for token in (*self.tokens, *self.admin_tokens)):
            raise ValueError("a token is empty; give at least one sign, or no token")

    @property
    def open(self) -> bool:
        """Whether nobody needs a token."""
        return not self.tokens and not self.admin_tokens

    def may_ask(self, authorization: bytes) -> bool:
        """Whether the header opens the service."""
        return self.open or _among(authorization, (*self.tokens, *self.admin_tokens))

    def may_change(self, authorization: bytes) -> bool:
        """Whether the header opens changing prompts."""
        return self.changes and _among(authorization, self.admin_tokens or self.tokens)


@final
@dataclass
class Record:
    """What is known of a request when it is over; routes fill it in."""

    prompt: str = ""
    rows: int = 0
    requests: list[EngineRequest] = field(default_factory=list)
    """Given up when the request is over, however it ends."""
    texts: list[Any] = field(default_factory=list)
    answers_each: int = 1
    """Answers to each input, whose tickets are neighbours."""

    @property
    def read(self) -> int:
        """Tokens of the input, each input counted once."""
        return sum(len(request.ids) for request in self.requests[:: self.answers_each])

    @property
    def written(self) -> int:
        """Tokens of the answer."""
        return sum(request.written for request in self.requests)


@final
class RequestMiddleware:
    """ASGI middleware. A body is read whole before the application sees it: it is small, or it is refused."""

    def __init__(self, app: App, access: AuthConfig, metrics: Metrics, log_texts: bool) -> None:
        self._app, self._access, self._metrics, self._log_texts = app, access, metrics, log_texts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and write down how it went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, start, status = Record(), time.monotonic(), 499
        scope["record"] = record

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                body, refusal = await self._body(scope, receive)
            if refusal is not None:
                await refusal(scope, receive, sending)
                return
            await self._app(scope, _replaying(body, receive), sending)
        except Exception:
            status = 500 if status == 499 else status  # what is answered to it is sent from further out
            raise
        finally:
            for request in record.requests:
                request.cancel()
            self._write_down(scope, record, status, time.monotonic() - start)

    def _refusal(self, scope: Scope) -> Any:
        headers = dict(scope["headers"])
        access, path = self._access, scope["path"]
        if access.open and (refusal := _stranger(headers)) is not None:
            return refusal
        authorization = headers.get(b"authorization", b"")
        if path not in _OPEN and not access.may_ask(authorization):
            return answer(
                401,
                "a valid token is needed; send it as Authorization: Bearer TOKEN",
                "authentication_error",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )
        changes = path.startswith(UPLOADS) and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if changes and not access.may_change(authorization):
            return answer(
                403,
                "prompts cannot be changed with this token; start the service with one that may",
                "permission_error",
                "forbidden",
            )
        return None

    async def _body(self, scope: Scope, receive: Receive) -> tuple[bytes, Any]:
        """The whole body, or why it is refused."""
        most = self._access.max_upload if scope["path"].startswith(UPLOADS) else self._access.max_body
        if scope["path"] in _OPEN:
            most = 0
        too_much = answer(
            413,
            f"the request is larger than {most} bytes; send less at once",
            code="too_large",
            headers={"Connection": "close"},
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > most:
            return b"", too_much
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._access.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b"", answer(499, "the client went away", "cancelled", "cancelled")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        return b"", too_much
                    if not message.get("more_body"):
                        return b"".join(parts), None
        except TimeoutError:
            return b"", answer(
                408,
                f"the request took longer than {self._access.body_seconds:g} seconds to arrive",
                "timeout",
                "timeout",
                {"Connection": "close"},
            )

    def _write_down(self, scope: Scope, record: Record, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.answered(route, status, record.prompt, seconds, record.read, record.written)
        line: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 4),
            "prompt": record.prompt,
            "rows": record.rows,
            "read": record.read,
            "written": record.written,
        }
        if self._log_texts:
            line["texts"] = record.texts
        _log.info("request", extra={"fields": line})


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)


def _among(authorization: bytes, tokens: tuple[str, ...]) -> bool:
    scheme, _, given = authorization.partition(b" ")
    # Every token is compared, so that the time tells nothing of which one was near.
    found = [hmac.compare_digest(given.strip(), token.encode()) for token in tokens]
    return scheme.lower() == b"bearer" and any(found)


def this_machine(name: str) -> bool:
    """Whether an address or a name is this machine's own, whoever resolves it.

    >>> this_machine("127.0.0.1"), this_machine("[::1]"), this_machine("example.org")
    (True, True, False)
    """
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _stranger(headers: Mapping[bytes, bytes]) -> Any:
    """Why a request is refused that a page of another site may have sent."""
    if not this_machine(_name(headers.get(b"host", b""))):
        return answer(
            421, "the service answers to names of this machine alone; ask localhost, or start it with a token"
        )
    origin = headers.get(b"origin")
    if origin is not None and not this_machine(_name(origin.partition(b"://")[2])):
        return answer(
            403,
            "a page of another site may not ask; open the service's own page, or start it with a token",
            "permission_error",
            "forbidden",
        )
    return None


def _name(host: bytes) -> str:
    text = host.decode("latin-1")
    return text.rsplit(":", 1)[0] if not text.endswith("]") else text


def _replaying(body: bytes, receive: Receive) -> Receive:
    """The body at once, then what the connection says further: that the client has gone."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
