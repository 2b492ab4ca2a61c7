"""The HTTP interface: OpenAI's client, careless clients, metrics and the log."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError

from softprompt import open_run
from softprompt.backbones import load
from softprompt.serve import Engine
from softprompt.serve.api.app import make_app
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.api.schemas import ChatRequest, ClassifyRequest, CompletionRequest
from softprompt.serve.metrics import Metrics

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def test_openai_client_lists_completes_streams_and_chats(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, tokenizer = service.openai(), service.engine.backbone.tokenizer
    assert [model.id for model in client.models.list()] == ["p0", "p1", "p2", "base"]
    assert client.models.retrieve("p1").owned_by == "softprompt"
    tokens = service.engine.generate("p1", "a b", max_new_tokens=12).result(30.0).tokens
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    full = client.completions.create(model="p1", prompt="a b", max_tokens=12)
    assert full.choices[0].text == expected
    assert full.usage is not None
    assert full.usage.completion_tokens == len(tokens)
    stream = client.completions.create(
        model="p1", prompt="a b", max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == len(tokens)
    assert pieces[-2].choices[0].finish_reason in ("stop", "length")
    several = client.completions.create(model="p1", prompt=["a b", "c"], max_tokens=12, n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[1].text == expected
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="p1", messages=[{"role": "user", "content": "a"}])
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    text = client.completions.create(model="p2", prompt="user: a\nassistant:", max_tokens=6).choices[0].text
    chat = client.chat.completions.create(
        model="p2", messages=[{"role": "user", "content": "a"}], max_completion_tokens=6, temperature=0
    )
    assert chat.choices[0].message.role == "assistant"
    parts = client.chat.completions.create(
        model="p2", messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}], max_tokens=6, stream=True
    )
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    assert streamed == chat.choices[0].message.content
    assert text != ""


def test_openai_client_understands_errors(service: Any) -> None:
    client = service.openai()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="suffix is not supported") as refused:
        client.completions.create(model="p0", prompt="a", suffix="b")
    assert (refused.value.param, refused.value.code) == ("suffix", "unsupported_parameter")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.address}/v1", api_key="wrong", max_retries=0).models.list()


def test_stop_ends_the_text_before_it(service: Any) -> None:
    client = service.openai()
    full = client.completions.create(model="p1", prompt="a b", max_tokens=12).choices[0].text
    stop = full[3:5]
    for stream in (False, True):
        answer: Any = client.completions.create(model="p1", prompt="a b", max_tokens=12, stop=stop, stream=stream)
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == full[: full.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_classify_returns_label_and_scores(service: Any, error_of: Callable[..., Any]) -> None:
    with service.client() as client:
        body = {"model": "p0", "input": ["a", "b b b"], "labels": ["yes", "no"]}
        answer = client.post("/v1/classify", json=body).json()
        for index, text in enumerate(["a", "b b b"]):
            result = answer["results"][index]
            scores = service.engine.classify("p0", [text], ["yes", "no"])[0].result(30.0).logprobs
            probs = torch.tensor(scores).softmax(0).tolist()
            assert list(result["probabilities"].values()) == pytest.approx(probs, abs=1e-6)
            assert result["label"] == max(result["probabilities"], key=result["probabilities"].get)
        assert "no labels" in error_of(client.post("/v1/classify", json={"model": "p0", "input": "a"}))["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b"\x00\x01\x02",
        b'{"model": "p0", "prompt": "\xff"}',
        b'{"model": "p0", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "p0", "prompt": "a", "temperature": NaN}',
        b'{"model": "p0", "prompt": "a", "temperature": 1e999}',
        b'{"model": "p0", "prompt": "a", "max_tokens": 1e30}',
        b'{"model": "p0", "prompt": "a", "max_tokens": 100000}',
        b'{"model": "p0", "prompt": [999999]}',
        b'{"model": "p0", "prompt": [-1]}',
        b'{"model": "p0", "prompt": []}',
        b'{"model": "p0", "prompt": [[]]}',
        b'{"model": "p0", "prompt": "a", "surprise": 1}',
        b'{"model": "p0", "row": {"text": "a"}}',
        b'{"model": "p0"}',
        b'{"model": "p0", "prompt": "' + b"a " * 3000 + b'"}',
        b"[" * 100_000,
    ],
)
def test_malformed_request_fails_alone(service: Any, content: bytes, error_of: Callable[..., Any]) -> None:
    with service.client() as client:
        response = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert 400 <= response.status_code < 500, response.text
        assert error_of(response)["message"]
        good = client.post("/v1/completions", json={"model": "p0", "prompt": "a", "max_tokens": 1})
        assert good.status_code == 200


def test_zero_byte_is_a_character(service: Any) -> None:
    with service.client() as client:
        body = {"model": "p0", "prompt": "a\0b", "max_tokens": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        body = {"model": "p0", "input": "a\0b", "labels": ["x\0", "y"]}
        assert client.post("/v1/classify", json=body).status_code == 200


def test_metrics_count_requests_rows_and_tokens(service: Any) -> None:
    with service.client() as client:
        client.post("/v1/classify", json={"model": "p0", "input": ["a", "b"], "labels": ["x", "y"]})
        client.post("/v1/completions", json={"model": "p1", "prompt": "a", "max_tokens": 3})
        client.post("/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 3})
        client.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
        text = client.get("/metrics").text
    for line in (
        'softprompt_batch_rows_count{kind="classify"} 1.0',
        'softprompt_batch_rows_sum{kind="classify"} 2.0',
        'softprompt_requests_total{route="/v1/completions",status="404"} 1.0',
        'softprompt_request_seconds_count{prompt="p0",route="/v1/classify"} 1.0',
        "softprompt_queued_rows 0.0",
        "softprompt_prompts 3.0",
    ):
        assert line in text
    for name in ("p1", "base"):
        assert f'softprompt_tokens_total{{kind="output",prompt="{name}"}}' in text
    assert "nobody" not in text


@pytest.mark.parametrize("log_texts", [False, True])
def test_log_has_no_texts_unless_asked(
    engine_of: Callable[..., Engine], caplog: pytest.LogCaptureFixture, log_texts: bool
) -> None:

    app = make_app(engine_of(prompts=1), AuthConfig(), log_texts=log_texts)
    with caplog.at_level("INFO", logger="softprompt.serve"), TestClient(app, base_url="http://localhost") as client:
        assert client.post("/v1/completions", json={"model": "p0", "prompt": "secret a", "max_tokens": 2}).is_success
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert lines[0]["prompt"] == "p0"
    assert lines[0]["status"] == 200
    assert ("secret" in json.dumps(lines)) == log_texts


def test_duplicate_or_long_label_is_rejected(service: Any, error_of: Callable[..., Any]) -> None:
    with service.client() as client:
        body = {"model": "p0", "input": "a", "labels": ["x", "x", "y"]}
        assert "name one twice" in error_of(client.post("/v1/classify", json=body))["message"]
        body["labels"] = ["x", "y" + " z" * 80]
        assert "at most 32" in error_of(client.post("/v1/classify", json=body))["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [1] * 50_000 + ["x"]}),
        (CompletionRequest, {"prompt": [[None] * 50_000]}),
        (CompletionRequest, {"row": dict.fromkeys(map(str, range(50_000)))}),
        (CompletionRequest, {"prompt": "a", **dict.fromkeys(map(str, range(50_000)))}),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 50_000}),
        (ClassifyRequest, {"input": [1] * 50_000}),
        (ClassifyRequest, {"input": [{str(n): None for n in range(50_000)}]}),
        (ClassifyRequest, {"input": "a", "labels": [1] * 50_000}),
        (ChatRequest, {"messages": [1] * 50_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 50_000}]}),
    ],
)
def test_validation_reports_few_errors(kind: Any, body: dict[str, Any]) -> None:
    """Each error takes a hundred times the bytes that were sent."""
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": "p", **body})
    assert wrong.value.error_count() < 10


def test_labels_are_of_the_prompt_that_answered(run_folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load(open_run(run_folders[0]).experiment.backbone, dtype="float32")
    with Engine(backbone) as engine:
        entry = engine.add("p", run_folders[0])
        assert entry.task is not None
        words = {label.upper(): word for label, word in entry.task.label_words.items()}
        real = engine.classify

        def classify(*arguments: Any, **more: Any) -> Any:
            engine._entries["p"] = replace(entry, task=replace(entry.task, label_words=words))
            return real(*arguments, **more)

        monkeypatch.setattr(engine, "classify", classify)
        with TestClient(make_app(engine), base_url="http://localhost") as client:
            answer = client.post("/v1/classify", json={"model": "p", "input": "a a"}).json()["results"][0]
    assert set(answer["probabilities"]) == set(words)


def test_metrics_of_a_removed_prompt_stay_removed(engine_of: Callable[..., Engine]) -> None:
    engine, metrics = engine_of(prompts=1), Metrics()
    metrics.bind(engine)
    metrics.observe_request("/v1/classify", 200, "p0", 0.1, 1, 0)
    assert b"p0" in metrics.render()
    engine.remove("p0")
    metrics.remove_prompt("p0")
    metrics.observe_request("/v1/classify", 200, "p0", 0.1, 1, 0)  # a request that was running meanwhile
    assert b"p0" not in metrics.render()


def test_backbone_path_is_not_revealed(run_folders: list[Path]) -> None:
    source = open_run(run_folders[0]).experiment.backbone
    with Engine(load(source, dtype="float32")) as engine:
        engine.add("p", run_folders[0])
        with TestClient(make_app(engine), base_url="http://localhost") as client:
            body: dict[str, Any] = {"model": "p", "messages": [{"role": "user", "content": "a"}]}
            answers = [client.post("/v1/chat/completions", json=body)]
            answers.append(client.post("/v1/completions", json={"model": "p", "prompt": [1] * 250, "max_tokens": 60}))
    for answer in answers:
        assert answer.status_code == 400
        assert Path(source).name in answer.text
        assert source not in answer.text
