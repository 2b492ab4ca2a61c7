"""`--engine vllm`: the answers are the local engine's, and a server that fails or differs gives none."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm, other_weights
from safetensors.torch import save_file

from softprompt.backbones import load_embeddings
from softprompt.models import Sampling
from softprompt.prompts import SoftPrompt
from softprompt.serve import Engine, EngineClosed, EngineUnavailable, Limits, QueueFull, VllmEngine
from softprompt.serve.engine import vllm

PromptOf = Callable[..., SoftPrompt]
TEXTS = ("a a a", "Ticket: b b\nQueue:", "c", "d e f d e f d e f")


@pytest.fixture
def server(local_engine: Engine) -> Iterator[FakeVllm]:
    fake = FakeVllm(local_engine.backbone.model)
    with fake:
        yield fake


@pytest.fixture
def engine(server: FakeVllm, llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    monkeypatch.setattr(vllm, "_CHECK_SECONDS", 0.1)
    with VllmEngine(load_embeddings(str(llama_folder), dtype="float32"), url_of(server)) as engine:
        yield engine


def url_of(server: FakeVllm) -> str:
    return f"http://127.0.0.1:{server.port}"


def add_everywhere(engines: tuple[Any, ...], run_folders: list[Path], prompt_of: PromptOf, folder: Path) -> None:
    """Two runs, a prompt of another length and a PEFT file, in each engine."""
    prompt = prompt_of(engines[0].backbone, 4)
    folder.mkdir()
    save_file(
        {"prompt_embeddings": torch.randn(7, 32, generator=torch.Generator().manual_seed(3))},
        folder / "adapter_model.safetensors",
    )
    for engine in engines:
        engine.add("short", run_folders[0])
        engine.add("long", run_folders[1])
        engine.add("plain", prompt)
        engine.add("file", folder)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_answers_equal_the_local_engines(
    engine: VllmEngine, local_engine: Engine, run_folders: list[Path], prompt_of: PromptOf, tmp_path: Path
) -> None:
    add_everywhere((engine, local_engine), run_folders, prompt_of, tmp_path / "file")
    labels = ["yes", "billing team", "billing desk", "no"]

    def requests(of: Any) -> list[Any]:
        texts = [
            of.generate(name, text, max_new_tokens=9) for name in ("plain", "file", "base", "short") for text in TEXTS
        ]
        rows = [of.classify(name, [{"text": text} for text in TEXTS]) for name in ("short", "long")]
        rows += [of.classify(name, TEXTS, labels) for name in ("plain", "file", "base")]
        others = [
            of.generate("short", {"text": "a b"}, max_new_tokens=5),
            of.generate("file", [40, 41, 42], max_new_tokens=5, logit_bias={7: 100.0}),
            of.generate("plain", "a", max_new_tokens=12, presence_penalty=2.0, frequency_penalty=1.0),
            of.generate("plain", "a", max_new_tokens=0),
        ]
        return [*texts, *others, *(request for part in rows for request in part)]

    answers, expected = ([request.result(60.0) for request in requests(of)] for of in (engine, local_engine))
    assert len(answers) == 40
    for answer, live in zip(answers, expected, strict=True):
        if hasattr(live, "tokens"):
            assert answer == live
        else:
            assert answer.logprobs == pytest.approx(live.logprobs, abs=1e-4)
    lengths = {len(ids) for request in engine.classify("plain", ["a"], labels) for ids in request.candidates}
    assert len(lengths) > 1


def test_stop_token_ends_a_text(
    engine: VllmEngine, local_engine: Engine, server: FakeVllm, prompt_of: PromptOf
) -> None:
    for of in (engine, local_engine):
        of.add("p", prompt_of(local_engine.backbone, 2))
    [end] = local_engine._stop
    bias = {end: 8.0}
    answers = [
        [of.generate("p", text, max_new_tokens=30, logit_bias=bias).result(60.0) for text in TEXTS]
        for of in (engine, local_engine)
    ]
    assert answers[0] == answers[1]
    assert {answer.finish_reason for answer in answers[0]} >= {"stop"}


def test_seed_repeats_a_drawn_text(engine: VllmEngine) -> None:
    draws = [
        engine.generate("base", "a b", max_new_tokens=9, sampling=Sampling(temperature=2.0, seed=seed)).result(60.0)
        for seed in (5, 5, -1, -1, 6)
    ]
    assert draws[0] == draws[1]
    assert draws[2] == draws[3]
    assert len({draw.tokens for draw in draws}) == 3


def test_many_labels_take_several_requests(engine: VllmEngine, local_engine: Engine, server: FakeVllm) -> None:
    """More different tokens than one request may ask for."""
    labels = [chr(33 + number) + chr(0x4E00 + 37 * number) for number in range(64)]
    server.requests.clear()
    [answer] = [request.result(60.0) for request in engine.classify("base", ["a a"], labels)]
    [expected] = [request.result(60.0) for request in local_engine.classify("base", ["a a"], labels)]
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    sizes = {(len(body["prompt_embeds"]), len(body["logprob_token_ids"])) for body in server.requests}
    assert len(sizes) > 2
    assert max(rows for rows, _ in sizes) == 64
    assert max(tokens for _, tokens in sizes) == 128


def test_api_serves_and_changes_prompts(
    engine: VllmEngine, local_engine: Engine, host_engine: Any, run_folders: list[Path], prompt_file: Any
) -> None:
    content = prompt_file(local_engine, length=5)
    for of in (engine, local_engine):
        of.add("tickets", run_folders[0])
    service = host_engine(engine)
    client = service.openai()
    with service.admin() as admin:
        assert admin.put("/v1/prompts/sent", content=content).status_code == 200
        assert admin.get("/v1/prompts/sent").json()["length"] == 5
    assert [model.id for model in client.models.list()] == ["sent", "tickets", "base"]
    expected = local_engine.generate("tickets", "a b", max_new_tokens=8).result(60.0)
    text = local_engine.backbone.tokenizer.decode(expected.tokens, skip_special_tokens=True)
    arguments: dict[str, Any] = {"model": "tickets", "prompt": "a b", "max_tokens": 8}
    assert client.completions.create(**arguments).choices[0].text == text
    chunks = list(client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text
    assert len(chunks) > 3
    stop = text[2:4]
    assert client.completions.create(**arguments, stop=stop).choices[0].text == text[: text.index(stop)]
    with service.client() as asking:
        body = {"model": "tickets", "input": ["a a", "b"]}
        results = asking.post("/v1/classify", json=body).json()["results"]
        scores = [request.result(60.0).logprobs for request in local_engine.classify("tickets", ["a a", "b"])]
        for result, row in zip(results, scores, strict=True):
            assert list(result["probabilities"].values()) == pytest.approx(
                torch.tensor(row).softmax(0).tolist(), abs=1e-4
            )
        assert (
            'softprompt_request_seconds_count{prompt="tickets",route="/v1/classify"} 1.0' in asking.get("/metrics").text
        )
        assert asking.delete("/v1/prompts/sent").status_code == 403
    with service.admin() as admin:
        assert admin.delete("/v1/prompts/sent").json()["deleted"]
        assert admin.post("/v1/classify", json={"model": "sent", "input": "a", "labels": ["x", "y"]}).status_code == 404
    with service.client({}) as stranger:
        assert stranger.post("/v1/classify", json=body).status_code == 401


def test_prompt_that_overflows_is_refused(
    engine: VllmEngine, server: FakeVllm, host_engine: Any, prompt_file: Any
) -> None:
    service = host_engine(engine)
    body = {"model": "fine", "input": "a", "labels": ["x", "y"]}
    with service.admin() as client:
        assert client.put("/v1/prompts/fine", content=prompt_file(engine)).status_code == 200
        server.fault = "nan"
        response = client.put("/v1/prompts/huge", content=prompt_file(engine))
        assert response.status_code == 400, response.text
        assert "overflows in tiny-llama" in response.json()["error"]["message"]
        assert client.post("/v1/classify", json=body).status_code == 500
    assert [path.name for path in service.store.iterdir()] == ["fine"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("error", "answers 500"), ("empty", "log-probabilities asked for")],
)
def test_fault_of_the_server_is_503(
    fault: str, message: str, engine: VllmEngine, server: FakeVllm, host_engine: Any
) -> None:
    service = host_engine(engine)
    server.fault = fault
    with service.client() as client:
        response = client.post("/v1/classify", json={"model": "base", "input": "a", "labels": ["x", "y"]})
        assert response.status_code == 503
        assert message in response.json()["error"]["message"]
        server.fault = ""
        body = {"model": "base", "prompt": "a", "max_tokens": 4}
        assert client.post("/v1/completions", json=body).status_code == 200


def test_stream_that_ends_early_is_an_error(engine: VllmEngine, server: FakeVllm, host_engine: Any) -> None:
    service = host_engine(engine)
    server.fault = "cut"
    body = {"model": "base", "prompt": "a b", "max_tokens": 6}
    with service.client() as client:
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 503
        assert "ended a text after 1 tokens" in response.json()["error"]["message"]
        assert '"code": "engine_unavailable"' in client.post("/v1/completions", json={**body, "stream": True}).text


def test_outage_is_503_until_the_server_is_back(engine: VllmEngine, server: FakeVllm, host_engine: Any) -> None:
    service = host_engine(engine)
    body = {"model": "base", "input": "a", "labels": ["x", "y"]}
    with service.client() as client:
        before = client.post("/v1/classify", json=body).json()["results"]
        server.stop()
        response = client.post("/v1/classify", json=body)
        assert response.status_code == 503
        assert (
            response.json()["error"]["message"]
            == "the vLLM server behind this service does not answer; try again later"
        )
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        server.start()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/classify", json=body).json()["results"] == before


def test_server_that_returns_with_other_weights_stays_out(
    engine: VllmEngine, server: FakeVllm, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    wait_until(lambda: not engine.status().ready)
    server.model = other_weights(server.model)
    server.start()
    wait_until(lambda: "start it with the same weights" in caplog.text)
    with pytest.raises(EngineUnavailable):
        engine.generate("base", "a", max_new_tokens=2)


def test_unhealthy_server_fails_running_requests(engine: VllmEngine, server: FakeVllm) -> None:
    server.fault = "hang"
    request = engine.generate("base", "a", max_new_tokens=2)
    wait_until(lambda: engine.status().generating == 1)
    server.fault = "dead"
    with pytest.raises(EngineUnavailable):
        request.result(20.0)


def test_timeout_and_cancellation_reach_the_server(engine: VllmEngine, server: FakeVllm) -> None:
    server.fault = "hang"
    server.requests.clear()
    late = engine.generate("base", "a", max_new_tokens=2)
    wait_until(lambda: len(server.requests) == 1)
    late.deadline = late.arrived + 0.01
    with pytest.raises(TimeoutError, match=r"no answer within 0\.01 seconds"):
        late.result(20.0)
    given_up = engine.classify("base", ["a"], ["x", "y"])[0]
    wait_until(lambda: len(server.requests) == 2)
    given_up.cancel()
    wait_until(lambda: server.disconnected == 2)
    waited_for = engine.classify("base", ["a"], ["x", "y"])[0]
    wait_until(lambda: len(server.requests) == 3)
    assert waited_for.future.cancel()  # as asyncio does where a wait for it is cancelled
    wait_until(lambda: server.disconnected == 3)
    assert not engine._running


def test_queue_is_bounded_and_taken_by_turns(server: FakeVllm, llama_folder: Path) -> None:
    limits = Limits(max_batch=2, max_queued=6)
    backbone = load_embeddings(str(llama_folder), dtype="float32")
    with VllmEngine(backbone, url_of(server), limits=limits) as engine:
        server.fault = "hang"
        running = [engine.generate("base", "a", max_new_tokens=2) for _ in range(2)]
        wait_until(lambda: len(engine._running) == 2)
        queued = [engine.generate("base", "a", max_new_tokens=2) for _ in range(6)]
        with pytest.raises(QueueFull, match=r"the queue is full \(6 rows\)"):
            engine.generate("base", "a", max_new_tokens=2)
        assert engine.status().queued == 6
        server.fault = ""
        assert [len(request.result(60.0).tokens) for request in running + queued] == [2] * 8


def test_closing_finishes_what_it_can(server: FakeVllm, llama_folder: Path) -> None:
    engine = VllmEngine(load_embeddings(str(llama_folder), dtype="float32"), url_of(server))
    request = engine.generate("base", "a", max_new_tokens=5)
    engine.close(20.0)
    assert len(request.result(0.0).tokens) == 5
    assert not engine.alive
    engine = VllmEngine(load_embeddings(str(llama_folder), dtype="float32"), url_of(server))
    server.fault = "hang"
    request = engine.generate("base", "a", max_new_tokens=5)
    engine.close(0.2)
    with pytest.raises(EngineClosed, match="the service shut down"):
        request.result(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logprobs": 2}, "logprobs is not supported with --engine vllm"),
        ({"logprobs": 0, "score_input": True}, "logprobs is not supported"),
        ({"sampling": Sampling(temperature=3.0)}, "temperature is 3, and vLLM takes at most 2"),
        ({"max_new_tokens": 199}, "exceed the 200 of the vLLM server"),
    ],
)
def test_unsupported_option_is_refused(
    settings: dict[str, Any], message: str, engine: VllmEngine, server: FakeVllm
) -> None:
    server.requests.clear()
    with pytest.raises(ValueError, match=message):
        engine.generate("base", "a", **{"max_new_tokens": 3, **settings})
    assert not server.requests


def test_prompt_that_is_no_vectors_is_refused(
    engine: VllmEngine, local_engine: Engine, prompt_of: PromptOf, unchecked: None
) -> None:
    for method in ("dept", "adept"):
        with pytest.raises(ValueError, match="also changes the input's own embeddings"):
            engine.add("shifting", prompt_of(local_engine.backbone, 1, method))
    assert [entry.name for entry in engine.models] == ["base"]
