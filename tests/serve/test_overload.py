"""A service under load: clients that disconnect, a full queue, timeouts and shutdown."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import httpx
import pytest

from softprompt.serve import Limits
from softprompt.serve import service as service_module
from softprompt.serve.config import ServeConfig
from softprompt.serve.engine.generation import CausalGenerationBatch


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_cancels_its_request(service: Any, stream: bool, monkeypatch: Any) -> None:
    real = service.engine._runner.decode
    monkeypatch.setattr(service.engine._runner, "decode", lambda: (time.sleep(0.02), real()))
    body = json.dumps({"model": "p0", "prompt": "a", "max_tokens": 200, "stream": stream})
    with socket.create_connection(service.host_and_port, timeout=10) as killed:
        killed.sendall(service.post("/v1/completions", body))
        while service.engine.status().generating == 0:
            time.sleep(0.01)
    gone = time.monotonic()
    while service.engine.status().generating and time.monotonic() - gone < 10:
        time.sleep(0.01)
    assert time.monotonic() - gone < 2  # 200 tokens would take 4 seconds


def test_full_queue_is_answered_at_once_and_recovers(
    service_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., Any]
) -> None:
    service = service_of(prompts=3, max_batch=2, max_queued=6)
    real = service.engine._runner.classify
    monkeypatch.setattr(service.engine._runner, "classify", lambda requests: (time.sleep(0.05), real(requests)))
    codes: list[int] = []
    took: dict[int, list[float]] = {200: [], 429: []}

    def ask(name: str) -> None:
        with service.client() as client:
            for _ in range(8):
                start = time.monotonic()
                response = client.post("/v1/classify", json={"model": name, "input": "a", "labels": ["x", "y"]})
                codes.append(response.status_code)
                took[response.status_code].append(time.monotonic() - start)
                if response.status_code == 429:
                    assert int(response.headers["Retry-After"]) >= 1
                    assert error_of(response)["type"] == "rate_limit_error"

    threads = [threading.Thread(target=ask, args=(f"p{number % 3}",)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {200, 429} == set(codes)
    assert sorted(took[429])[len(took[429]) // 2] < 0.5
    assert max(took[200]) < 3  # 6 queued rows, 2 at a time, take some 0.3 seconds
    monkeypatch.undo()
    with service.client() as client:
        body = {"model": "p0", "input": "a", "labels": ["x", "y"]}
        assert client.post("/v1/classify", json=body).status_code == 200


def test_slow_answer_times_out(
    service_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error_of: Callable[..., Any]
) -> None:
    service = service_of(prompts=1, timeout=0.2)
    real = service.engine._runner.decode
    monkeypatch.setattr(service.engine._runner, "decode", lambda: (time.sleep(0.02), real()))
    with service.client() as client:
        response = client.post("/v1/completions", json={"model": "p0", "prompt": "a", "max_tokens": 200})
        assert response.status_code == 504
        assert "0.2 seconds" in error_of(response)["message"]
        body = {"model": "p0", "prompt": "a", "max_tokens": 200, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            last = [line for line in stream.iter_lines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_shutdown_finishes_running_requests(service_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of(prompts=1)
    real = service.engine._runner.decode
    monkeypatch.setattr(service.engine._runner, "decode", lambda: (time.sleep(0.01), real()))
    responses: list[Any] = []

    def ask() -> None:
        with service.client() as client:
            responses.append(client.post("/v1/completions", json={"model": "p0", "prompt": "a", "max_tokens": 50}))

    thread = threading.Thread(target=ask)
    thread.start()
    while service.engine.status().generating == 0:
        time.sleep(0.005)
    closing = threading.Thread(target=service.engine.close)
    closing.start()
    with service.client() as client:
        time.sleep(0.05)
        assert client.get("/readyz").status_code == 503
        refused = client.post("/v1/completions", json={"model": "p0", "prompt": "a"})
        assert refused.status_code == 503
    thread.join(30)
    closing.join(30)
    assert responses[0].status_code == 200
    assert responses[0].json()["usage"]["completion_tokens"] > 0


def test_requests_left_at_shutdown_are_told_so(
    tiny_backbone: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server waits for the engine, whose error says what happened: 503, or an event in a stream."""
    servers: list[Any] = []
    addresses: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(service_module, "_stop_on_signal", lambda server: nullcontext(servers.append(server)))
    monkeypatch.setattr(service_module, "configure_logging", lambda: None)
    step = CausalGenerationBatch.step
    monkeypatch.setattr(CausalGenerationBatch, "step", lambda batch: (time.sleep(0.1), step(batch))[1])
    config = ServeConfig(backbone="llama", port=0, grace=0.5)
    running = threading.Thread(
        target=service_module.serve, args=[config, tiny_backbone("llama")], kwargs={"on_start": addresses.put}
    )
    running.start()
    address = addresses.get(timeout=60)
    body = {"model": "base", "prompt": "a", "max_tokens": 200, "logit_bias": {"1": -100}}
    answers: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        answers[stream] = httpx.post(f"{address}/v1/completions", json={**body, "stream": stream}, timeout=60)

    threads = [threading.Thread(target=ask, args=[stream]) for stream in (False, True)]
    for thread in threads:
        thread.start()
    while httpx.get(f"{address}/v1/status").json()["generating"] < 2:
        time.sleep(0.05)
    servers[0].should_exit = True
    for thread in (*threads, running):
        thread.join(60)
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["code"] == "shutting_down"
    last = [line for line in answers[True].text.splitlines() if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_client_gone_before_its_stream_starts_frees_its_slot(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = service.engine, threading.Event()
    real, step = engine.generate, engine._runner.decode
    monkeypatch.setattr(engine._runner, "decode", lambda: (time.sleep(0.02), step()))
    monkeypatch.setattr(engine, "generate", lambda *a, **k: (asked.set(), time.sleep(0.3), real(*a, **k))[-1])
    body = json.dumps({"model": "p0", "prompt": "a", "max_tokens": 200, "stream": True})
    with socket.create_connection(service.host_and_port, timeout=10) as killed:
        killed.sendall(service.post("/v1/completions", body))
        assert asked.wait(10)
    gone = time.monotonic()
    while not engine.status().generating and time.monotonic() - gone < 1:
        time.sleep(0.005)
    while engine.status().generating and time.monotonic() - gone < 10:
        time.sleep(0.01)
    assert time.monotonic() - gone < 2  # 200 tokens would take 4 seconds


@pytest.mark.parametrize("wait", [float("inf"), float("nan"), -1.0])
def test_max_wait_that_is_not_finite_is_rejected(wait: float) -> None:
    with pytest.raises(ValueError, match="max_wait"):
        Limits(max_wait=wait)
