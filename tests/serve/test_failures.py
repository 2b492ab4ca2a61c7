"""Failures stay local: bad rows, failing batches, memory that runs out, and the engine's own thread."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient

from softprompt.models import Sampling
from softprompt.models.encoder_decoder import EncoderDecoder
from softprompt.prompts import Folded
from softprompt.serve import Engine, EngineClosed, Limits
from softprompt.serve.api.app import make_app
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.engine.kv_cache import Batch, CachedDecoder

EngineOf = Callable[..., Engine]
TEXTS = ("a", "b b", "Ticket: a a c", "c b a a b c\nQueue:", "some words that were never seen", "x" * 30)
LABELS = ("yes", "no", "maybe so")


class FailingEmbedding:
    """The model's embedding layer, failing for some batches as if memory ran out."""

    def __init__(self, engine: Engine, fails: Callable[[torch.Tensor], BaseException | None]) -> None:
        self._real = engine.backbone.model.get_input_embeddings()
        self._fails, self.calls = fails, 0

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if (error := self._fails(ids)) is not None:
            raise error
        return self._real(ids)


@pytest.mark.parametrize("kind", ["classify", "generate"])
def test_out_of_memory_halves_the_batch(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    engine = engine_of(prompts=4, shifting=False, max_batch=8, max_wait=200.0)
    failing = FailingEmbedding(engine, lambda ids: torch.OutOfMemoryError("memory") if len(ids) > 2 else None)

    def ask() -> list[Any]:
        if kind == "classify":
            return [engine.classify(f"p{row % 4}", [TEXTS[row % 6]], LABELS)[0] for row in range(8)]
        return [engine.generate(f"p{row % 4}", TEXTS[row % 6], max_new_tokens=6) for row in range(8)]

    expected = [request.result(30.0) for request in ask()]
    monkeypatch.setattr(engine.backbone.model, "get_input_embeddings", lambda: failing)
    results = [request.result(30.0) for request in ask()]
    assert engine.status().max_batch < 8
    if kind == "generate":
        assert [output.tokens for output in results] == [output.tokens for output in expected]
    else:
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize("kind", ["classify", "generate"])
def test_bad_row_fails_alone(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    engine = engine_of(prompts=3, shifting=False, max_wait=200.0)
    marked = engine.backbone.tokenizer("x", add_special_tokens=False)["input_ids"][0]
    failing = FailingEmbedding(engine, lambda ids: RuntimeError("broken") if bool((ids == marked).any()) else None)
    monkeypatch.setattr(engine.backbone.model, "get_input_embeddings", lambda: failing)
    texts = ["a", "b", "x", "c", "a b"]
    if kind == "classify":
        requests: list[Any] = [engine.classify(f"p{i % 3}", [text], LABELS)[0] for i, text in enumerate(texts)]
    else:
        requests = [engine.generate(f"p{i % 3}", text, max_new_tokens=1) for i, text in enumerate(texts)]
    with pytest.raises(RuntimeError, match="broken"):
        requests[2].result(30.0)
    for index in (0, 1, 3, 4):
        assert requests[index].result(30.0)


def memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("memory")


@pytest.mark.parametrize("breaks", ["joining", "leaving"])
def test_out_of_memory_between_steps_keeps_texts(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """Rows that join and leave a batch move its keys and values, which also takes memory."""
    engine = engine_of(prompts=4, shifting=False, max_batch=8)
    asked = [(f"p{row % 4}", TEXTS[row % 6], 4 + 12 * (row % 3) if row else 40) for row in range(8)]
    expected = [engine.generate(name, text, max_new_tokens=most).result(30.0).tokens for name, text, most in asked]
    real, fails = CachedDecoder.concat, [0]

    def concat(self: CachedDecoder, rows: Any, room: int = 64) -> Batch:
        several = len({id(batch) for batch, _ in rows}) > 1
        fewer = not several and len(rows) < len(rows[0][0])
        if {"joining": several, "leaving": fewer}[breaks]:
            fails[0] += 1
            raise memory()
        return real(self, rows, room)

    monkeypatch.setattr(CachedDecoder, "concat", concat)
    began, requests = threading.Event(), []
    for name, text, most in asked:
        requests.append(engine.generate(name, text, max_new_tokens=most, on_token=lambda _: began.set()))
        assert began.wait(30)  # the first is being written, and 39 of its tokens are to come, when the others join
    assert [request.result(30.0).tokens for request in requests] == expected
    assert fails[0]
    assert engine.alive


def test_failed_pass_frees_its_tensors_before_the_retry(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=2, shifting=False, max_wait=200.0)
    real, activations, freed = engine.backbone.model.get_input_embeddings(), [], []

    def embed(ids: torch.Tensor) -> torch.Tensor:
        freed.extend(reference() is None for reference in activations)
        if len(ids) > 2:
            hidden = torch.zeros(10)
            activations.append(weakref.ref(hidden))
            raise memory()
        return real(ids)

    monkeypatch.setattr(engine.backbone.model, "get_input_embeddings", lambda: embed)
    for request in [engine.classify(f"p{row % 2}", ["a"], LABELS)[0] for row in range(4)]:
        request.result(30.0)
    assert freed
    assert all(freed)


def test_generation_that_overflows_fails_alone(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=3, shifting=False, max_batch=4)
    expected = [engine.generate(f"p{row}", "a b", max_new_tokens=12).result(30.0).tokens for row in (0, 1)]
    real, bad = CachedDecoder.decode_next, engine.get("p2").prompt

    def decode_next(self: CachedDecoder, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        logits = real(self, batch, tokens)
        if int(batch.token_counts[0]) > 6:
            logits[[prompt is bad for prompt in batch.prompts]] = torch.nan
        return logits

    monkeypatch.setattr(CachedDecoder, "decode_next", decode_next)
    broken = engine.generate("p2", "a b", max_new_tokens=12, sampling=Sampling(temperature=1.0))
    requests = [engine.generate(f"p{row}", "a b", max_new_tokens=12) for row in (0, 1)]
    with pytest.raises(FloatingPointError, match="p2"):
        broken.result(30.0)
    assert [request.result(30.0).tokens for request in requests] == expected


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoder_row_that_overflows_fails_alone(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = engine_of(name, prompts=2, shifting=False, max_batch=4)
    expected = [engine.generate(f"p{row}", "a b", max_new_tokens=12).result(30.0).tokens for row in (0, 1)]
    engine.add("huge", Folded(torch.full((3, engine.backbone.dim), 3e38)))
    real = EncoderDecoder._encode_rows

    def encoded(self: EncoderDecoder, rows: Any) -> Any:
        read, bad = real(self, rows), (rows.embeds.abs() > 1e37).flatten(1).any(1)
        return read._replace(states=read.states.masked_fill(bad[:, None, None], torch.nan))

    monkeypatch.setattr(EncoderDecoder, "_encode_rows", encoded)
    busy, release = threading.Event(), threading.Event()  # so that all requests start together
    holding = threading.Thread(target=engine._scheduler.run_job, args=(lambda: busy.set() or release.wait(20),))
    holding.start()
    assert busy.wait(20)
    broken = [
        engine.generate("huge", "a b", max_new_tokens=12, sampling=Sampling(temperature=temperature))
        for temperature in (0.0, 1.0)
    ]
    requests = [engine.generate(f"p{row}", "a b", max_new_tokens=12) for row in (0, 1)]
    release.set()
    holding.join()
    for request in broken:
        with pytest.raises(FloatingPointError, match="huge"):
            request.result(30.0)
    assert [request.result(30.0).tokens for request in requests] == expected
    assert engine.status().generating == 0


def test_classification_that_overflows_fails_alone(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=2, shifting=False, max_wait=200.0)
    expected = engine.classify("p0", ["a"], LABELS)[0].result(30.0).logprobs
    real, bad = CachedDecoder.prefill, engine.get("p1").prompt

    def read(self: CachedDecoder, rows: Any, room: int = 0) -> Any:
        batch, logits = real(self, rows, room)
        logits[[row.prompt is bad for row in rows]] = torch.nan
        return batch, logits

    monkeypatch.setattr(CachedDecoder, "prefill", read)
    good, broken = engine.classify("p0", ["a"], LABELS)[0], engine.classify("p1", ["a"], LABELS)[0]
    assert good.result(30.0).logprobs == pytest.approx(expected, abs=1e-5)
    with pytest.raises(FloatingPointError, match="p1"):
        broken.result(30.0)
    with TestClient(make_app(engine), base_url="http://localhost") as client:
        answer = client.post("/v1/classify", json={"model": "p1", "input": "a", "labels": list(LABELS)})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "overflow"


def test_smallest_temperature_is_greedy(engine_of: EngineOf) -> None:
    engine = engine_of(prompts=2, shifting=False, max_batch=4)
    greedy = [engine.generate(f"p{row}", "a b", max_new_tokens=8).result(30.0).tokens for row in (0, 1)]
    cold = engine.generate("p0", "a b", max_new_tokens=8, sampling=Sampling(temperature=1e-300, seed=1))
    other = engine.generate("p1", "a b", max_new_tokens=8)
    assert [cold.result(30.0).tokens, other.result(30.0).tokens] == greedy


def test_prompt_that_overflows_is_rejected(engine_of: EngineOf) -> None:
    engine = engine_of("gpt2", prompts=1)
    with pytest.raises(ValueError, match="too large"):
        engine.add("huge", Folded(torch.full((3, engine.backbone.dim), 3e38)))
    assert "huge" not in engine


def test_failing_callback_fails_no_request(engine_of: EngineOf, prompt_of: Callable[..., Any]) -> None:
    backbone = engine_of(prompts=0).backbone

    def on_batch(_: object) -> None:
        raise RuntimeError("no room for metrics")

    with Engine(backbone, Limits(), on_batch) as engine:
        engine.add("p", prompt_of(backbone, 0))
        assert engine.classify("p", ["a"], LABELS)[0].result(30.0)
        assert len(engine.generate("p", "a", max_new_tokens=3).result(30.0).tokens) == 3


def test_dying_thread_fails_its_requests(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(prompts=1)

    def die(_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(engine._runner, "classify", die)
    with TestClient(make_app(engine), base_url="http://localhost") as client:
        assert client.get("/healthz").status_code == 200
        with pytest.raises(EngineClosed, match="failed"):
            engine.classify("p0", ["a"], LABELS)[0].result(10.0)
        with pytest.raises(EngineClosed):
            engine.generate("p0", "a")
        engine._scheduler._thread.join(10)
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 503


def test_internal_error_is_counted_and_logged(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_of(prompts=1)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "classify", broken)
    app = make_app(engine, AuthConfig())
    with (
        caplog.at_level("INFO", logger="softprompt.serve"),
        TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client,
    ):
        answer: httpx.Response = client.post("/v1/classify", json={"model": "p0", "input": "a", "labels": ["x", "y"]})
        numbers = client.get("/metrics").text
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert 'softprompt_requests_total{route="/v1/classify",status="500"} 1.0' in numbers
    assert next(record.fields["status"] for record in caplog.records if hasattr(record, "fields")) == 500
