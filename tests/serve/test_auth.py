"""Tokens, host names and origins without a token, and the size and duration of a body."""

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from softprompt.serve.api.auth import AuthConfig


def test_tokens_permit_asking_and_changing(
    service: Any, prompt_file: Callable[..., bytes], error_of: Callable[..., Any]
) -> None:
    content = prompt_file(service.engine)
    ask = {"model": "p0", "prompt": "a", "max_tokens": 1}
    rejected = [
        "",
        "Bearer",
        "Bearer wrong",
        "Basic sesame",
        f"Bearer {service.token}x",
        f"Bearer {service.token[:-1]}",
    ]
    for header in rejected:
        with service.client({"Authorization": header} if header else {}) as client:
            for path in ("/v1/models", "/v1/prompts", "/metrics", "/v1/status"):
                assert client.get(path).status_code == 401
            assert error_of(client.post("/v1/completions", json=ask))["code"] == "invalid_api_key"
            assert client.put("/v1/prompts/x", content=content).status_code == 401
            assert client.get("/healthz").status_code == client.get("/").status_code == 200
    with service.client() as client:
        assert client.post("/v1/completions", json=ask).status_code == 200
        assert client.put("/v1/prompts/x", content=content).status_code == 403
        assert client.delete("/v1/prompts/p0").status_code == 403


def test_service_without_token_refuses_changes_and_other_hosts(
    service_of: Callable[..., Any], prompt_file: Callable[..., bytes]
) -> None:
    service = service_of(AuthConfig(), prompts=1)
    with service.client({}) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.put("/v1/prompts/x", content=prompt_file(service.engine)).status_code == 403
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421


def test_body_of_fifty_megabytes_is_rejected(service: Any) -> None:
    with service.client() as client:
        start = time.monotonic()
        response = client.post("/v1/completions", content=b"x" * 50_000_000)
        assert response.status_code == 413
        assert time.monotonic() - start < 5

    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b"x" * 1_000_000

    with service.client() as client:  # without a length in front
        try:
            assert client.post("/v1/completions", content=pieces()).status_code == 413
        except httpx.TransportError:  # the connection was closed before the last piece
            assert client.get("/healthz").status_code == 200


def test_body_that_never_ends_times_out(service: Any) -> None:
    host, port = service.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {service.token}\r\n"
        slow.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        assert b"408" in slow.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example:8000"])
def test_service_without_token_refuses_other_origins(service_of: Callable[..., Any], origin: str) -> None:
    service = service_of(AuthConfig(), prompts=1)
    body = {"model": "p0", "prompt": "a", "max_tokens": 1}
    with service.client({}) as client:
        assert client.post("/v1/completions", json=body, headers={"Origin": origin}).status_code == 403
        assert client.post("/v1/completions", json=body, headers={"Origin": service.address}).status_code == 200
        for host in ("LOCALHOST:8000", "127.0.0.2", "[::1]:1", "localhost"):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_public_routes_take_no_body(service: Any) -> None:
    with service.client({}) as client:
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert client.request("GET", path, content=b"x" * 1000).status_code == 413
            assert client.get(path).status_code == 200


@pytest.mark.parametrize("tokens", [("",), ("good", " ")])
def test_empty_token_is_rejected(tokens: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="a token is empty"):
        AuthConfig(tokens=tokens)
