"""A step of the engine's thread that does not end."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from softprompt.serve import Engine, EngineClosed
from softprompt.serve.engine import scheduler

EngineOf = Callable[..., Engine]
LABELS = ("yes", "no")


def test_stuck_thread_is_reported(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go, stuck = engine_of(prompts=1, timeout=0.1), threading.Event(), threading.Event()
    monkeypatch.setattr(scheduler, "_MIN_STEP_TIMEOUT", 0.1)
    monkeypatch.setattr(engine._runner, "classify", lambda _: (stuck.set(), go.wait(20)))
    request = engine.classify("p0", ["a"], LABELS, timeout=0.1)[0]
    assert stuck.wait(10)
    time.sleep(0.2)
    assert not engine.alive
    assert not engine.status().ready
    request.cancel()
    go.set()
    while not engine.alive:
        time.sleep(0.01)


def test_stuck_thread_can_be_shut_down(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, go, stuck = engine_of(prompts=1), threading.Event(), threading.Event()
    monkeypatch.setattr(scheduler, "JOIN_TIMEOUT", 0.2)
    monkeypatch.setattr(engine._runner, "classify", lambda _: (stuck.set(), go.wait(30)))
    errors: list[BaseException] = []

    def change() -> None:
        try:
            engine._scheduler.run_job(lambda: stuck.set() or go.wait(30))
        except BaseException as error:
            errors.append(error)

    changes = [threading.Thread(target=change, daemon=True) for _ in range(2)]  # one runs, one is queued
    closing = threading.Thread(target=engine.close, args=(0.1,), daemon=True)
    try:
        for thread in changes:
            thread.start()
        assert stuck.wait(10)
        requests = [engine.classify("p0", ["a"], LABELS)[0], engine.generate("p0", "a")]
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
        for request in requests:
            with pytest.raises(EngineClosed, match="shut down"):
                request.result(0.0)
        for thread in changes:
            thread.join(10)
        assert [type(error) for error in errors] == [EngineClosed, EngineClosed]
        engine.close(0.0)
    finally:
        go.set()
    engine._scheduler._thread.join(10)  # it returns to a closed service
    assert not engine._scheduler._thread.is_alive()


def test_upload_to_a_stuck_thread_times_out(
    service_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    prompt_file: Callable[..., bytes],
    error_of: Callable[..., Any],
) -> None:
    service, go, stuck = service_of(prompts=1, timeout=0.1), threading.Event(), threading.Event()
    engine, content = service.engine, prompt_file(service.engine)
    monkeypatch.setattr(scheduler, "_MIN_STEP_TIMEOUT", 0.3)
    monkeypatch.setattr(engine._runner, "classify", lambda _: (stuck.set(), go.wait(30)))
    engine.classify("p0", ["a"], LABELS)
    assert stuck.wait(10)
    with service.admin() as client:
        try:
            for _ in range(2):  # the first does not block the second
                answer = client.put("/v1/prompts/new", content=content, timeout=10)
                assert answer.status_code == 504
                assert "try again" in error_of(answer)["message"]
        finally:
            go.set()
        monkeypatch.setattr(scheduler, "_MIN_STEP_TIMEOUT", 60.0)
        assert engine._scheduler.run_job(lambda: "done") == "done"
        assert "new" not in engine  # a job that timed out does not run later
        assert not any(service.store.iterdir())
        assert client.put("/v1/prompts/new", content=content).status_code == 200
