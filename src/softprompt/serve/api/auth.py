"""Who may use the service: those who send a token or, if it has none, clients on this machine."""

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class AuthConfig:
    """Tokens, and the size and duration of a request's body.

    Tokens are compared as bytes in constant time. Without tokens anyone who reaches the service may send requests, but
    nobody may change prompts; requests must name a host of this machine (against DNS rebinding) and must not come from
    a page of another site.

    Raises:
        ValueError: a token is empty, so that requests without one would be accepted.
    """

    tokens: tuple[str, ...] = ()
    """May send requests; and change prompts if `admin_tokens` is empty."""
    admin_tokens: tuple[str, ...] = ()
    """May also add, replace and remove prompts."""
    max_body: int = 4 << 20
    """Bytes of a request's body."""
    max_upload: int = 64 << 20
    """Bytes of an uploaded prompt."""
    body_seconds: float = 30.0
    """Seconds in which a body must arrive."""
    allow_changes: bool = True
    """Whether prompts can be changed at all."""

    def __post_init__(self) -> None:
        if not all(token.strip() for token in (*self.tokens, *self.admin_tokens)):
            raise ValueError("a token is empty; give at least one character, or no token")

    @classmethod
    def load(cls, token_file: Path | None, admin_token_file: Path | None) -> "AuthConfig":
        """The tokens of the files, or else of SOFTPROMPT_TOKEN and SOFTPROMPT_ADMIN_TOKEN.

        Raises:
            ValueError: a file holds no token.
        """
        return cls(
            tokens=_read_tokens(token_file, "SOFTPROMPT_TOKEN"),
            admin_tokens=_read_tokens(admin_token_file, "SOFTPROMPT_ADMIN_TOKEN"),
        )

    @property
    def requires_token(self) -> bool:
        """Whether requests need a token."""
        return bool(self.tokens or self.admin_tokens)

    def check_host(self, host: str) -> None:
        """Check that the service does not listen beyond this machine without a token.

        Raises:
            ValueError: it would.
        """
        if not self.requires_token and not is_loopback(host):
            raise ValueError(
                f"{host} can be reached from other machines, but there is no token; set SOFTPROMPT_TOKEN or "
                "--token-file, or listen on 127.0.0.1"
            )

    def may_ask(self, authorization: bytes) -> bool:
        """Whether the Authorization header permits requests."""
        return not self.requires_token or _matches(authorization, (*self.tokens, *self.admin_tokens))

    def may_change(self, authorization: bytes) -> bool:
        """Whether the Authorization header permits changing prompts."""
        return self.allow_changes and _matches(authorization, self.admin_tokens or self.tokens)


def is_loopback(host: str) -> bool:
    """Whether an address or a host name always means this machine.

    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("example.org")
    (True, True, False)
    """
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _matches(authorization: bytes, tokens: tuple[str, ...]) -> bool:
    scheme, _, value = authorization.partition(b" ")
    # Compares with every token, so that the duration does not reveal which one is close.
    matches = [hmac.compare_digest(value.strip(), token.encode()) for token in tokens]
    return scheme.lower() == b"bearer" and any(matches)


def _read_tokens(file: Path | None, variable: str) -> tuple[str, ...]:
    text = os.environ.get(variable, "") if file is None else file.expanduser().read_text(encoding="utf-8")
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not tokens:
        raise ValueError(f"{file} holds no token; write one per line")
    return tokens
