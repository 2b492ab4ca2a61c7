"""Requests that cannot be answered: one sentence names the field and what it should be."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from softprompt.serve.api.schemas import _NEUTRAL, _NO_EFFECT, ChatRequest, CompletionRequest


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": [1, "a"]}, "prompt.1: Input should be a valid integer"),
        ("completions", {"prompt": ["a", 5]}, "prompt.1: Input should be a valid string"),
        ("completions", {"prompt": [[1, 2], [3, "x"]]}, "prompt.1.1: Input should be a valid integer"),
        ("completions", {"prompt": 5}, "prompt: Input should be text or a list"),
        ("completions", {"prompt": [{"a": 1}]}, "prompt.0: Input should be text, a whole number or a list"),
        ("completions", {"prompt": "a", "stop": ["a"] * 5}, "stop: List should have at most 4 items"),
        ("completions", {"prompt": "a", "stop": ["a", 1]}, "stop.1: Input should be a valid string"),
        ("completions", {"prompt": "a", "n": "many"}, "n: Input should be a valid integer"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix is not supported; leave it out"),
        ("completions", {"row": {"text": ["a"]}}, "row.text: Input should be text, a whole number, a number or true"),
        ("completions", {"promt": "a"}, "promt: Extra inputs are not permitted"),
        ("classify", {"input": ["a", 5]}, "input.1: Input should be text or an object"),
        ("classify", {"input": ["a", {"text": None}]}, "input.1.text: Input should be text, a whole number"),
        ("classify", {"input": {"text": {"a": 1}}}, "input.text: Input should be text, a whole number"),
        ("classify", {"input": "a", "labels": "yes"}, "labels: Input should be a valid list"),
        ("classify", {}, "input: Field required"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.te",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content: Input should be text",
        ),
        ("chat/completions", {"messages": [{"role": "boss", "content": ""}]}, "messages.0.role: Input should be 'sys"),
    ],
)
def test_validation_error_is_of_the_intended_type(service: Any, path: str, body: Any, message: str) -> None:
    answer = service.client().post(f"/v1/{path}", json={"model": "p0", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"


CHAT = {"messages": [{"role": "user", "content": "a"}]}


def _message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "a", **fields}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("completions", {"prompt": "a", "best_of": 3}, "best_of"),
        ("completions", {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 9999}, "max_tokens"),
        ("completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("completions", {"prompt": "a", "n": 17}, "n"),
        ("completions", {"prompt": ["a"] * 10, "n": 13}, "n"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias.5"),
        ("completions", {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias"),
        ("completions", {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens"),
        ("chat/completions", {**CHAT, "echo": True}, "echo"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {**CHAT, "logprobs": 2}, "logprobs"),
        ("chat/completions", {**CHAT, "max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {**CHAT, "functions": [{"name": "f"}]}, "functions"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {**CHAT, "modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {**CHAT, "reasoning_effort": "high"}, "reasoning_effort"),
        ("chat/completions", {**CHAT, "audio": {"voice": "x"}}, "audio"),
        ("chat/completions", {**CHAT, "prediction": {"type": "content"}}, "prediction"),
        ("chat/completions", {**CHAT, "verbosity": "low"}, "verbosity"),
        ("chat/completions", {**CHAT, "web_search_options": {}}, "web_search_options"),
        ("chat/completions", _message(tool_calls=[{"id": "1"}]), "messages.0.tool_calls"),
        ("chat/completions", _message(content=[{"type": "image_url"}]), "messages.0.content.0.type"),
        ("chat/completions", _message(role="tool"), "messages.0.role"),
    ],
)
def test_unsupported_field_is_refused_by_name(service: Any, path: str, body: Any, param: str) -> None:
    answer = service.client().post(f"/v1/{path}", json={"model": "p0", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.rpartition(".")[2] in error["message"]
    assert error["type"] == "invalid_request_error"


def test_values_that_ask_for_nothing_are_accepted(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.engine.backbone.tokenizer, "chat_template", "{{ messages[0].content }}")
    neutral: dict[str, Any] = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": []}
    neutral |= {"user": "me", "metadata": {"a": "b"}, "store": False, "stream": False, "top_logprobs": None}
    neutral |= {name: values[-1] for name, values in _NEUTRAL.items() if values}
    client = service.client()
    more = {"prompt": "a", "best_of": 1, "logprobs": None, "suffix": None}
    for path, body in (("completions", more), ("chat/completions", {**CHAT, "logprobs": False})):
        plain = {name: body[name] for name in ("prompt", "messages") if name in body}
        expected = client.post(f"/v1/{path}", json={"model": "p0", "max_tokens": 3, **plain}).json()
        answer = client.post(f"/v1/{path}", json={"model": "p0", "max_tokens": 3, **neutral, **body})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == expected["choices"]


@pytest.mark.parametrize("chat", [True, False])
def test_every_field_of_openais_client_is_known_and_documented(chat: bool) -> None:
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    params = (chat_create_params if chat else completion_create_params).CompletionCreateParamsBase.__annotations__
    request = ChatRequest if chat else CompletionRequest
    table = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    for name in [*params, "stream"]:
        assert name in request.model_fields or name in _NEUTRAL or name in _NO_EFFECT, name
        assert any(f"`{name}`" in row.split("|")[1] for row in rows), name


def test_body_that_is_not_json_is_named(service: Any) -> None:
    header = {"Content-Type": "application/json"}
    answer = service.client().post("/v1/completions", content=b'{"model": "p0", }', headers=header)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not JSON: ")


ODD = ["\x00", "a\x00b", "\ufffe", "\u202eabc", "שלום עולם", "a" * 3000, " \n\t ", "\u200b", "e\u0301" * 40, "🏳️‍🌈"]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_answered_or_rejected(service: Any, text: str) -> None:
    client: httpx.Client = service.client()
    for path, body in (
        ("completions", {"prompt": text, "max_tokens": 2}),
        ("completions", {"prompt": "a", "stop": text, "max_tokens": 2}),
        ("classify", {"input": text, "labels": ["yes", "no"]}),
        ("classify", {"input": "a", "labels": ["yes", text]}),
    ):
        answer = client.post(f"/v1/{path}", json={"model": "p1", **body})
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 400:
            assert len(answer.json()["error"]["message"]) > 20


@pytest.mark.parametrize("text", [r"a \ud800 b", r"\udfff", r"\ud83d"])
def test_half_a_surrogate_pair_is_rejected(service: Any, text: str) -> None:
    header = {"Content-Type": "application/json"}
    for path, body in (
        ("completions", f'{{"model": "p1", "prompt": "{text}"}}'),
        ("completions", f'{{"model": "p1", "prompt": "a", "stop": "{text}"}}'),
        ("completions", f'{{"model": "{text}", "prompt": "a"}}'),
        ("classify", f'{{"model": "p1", "input": {{"text": "{text}"}}, "labels": ["a", "b"]}}'),
        ("chat/completions", f'{{"model": "p1", "messages": [{{"role": "user", "content": "{text}"}}]}}'),
    ):
        answer = service.client().post(f"/v1/{path}", content=body.encode(), headers=header)
        assert answer.status_code == 400
        assert "half of a surrogate pair" in answer.json()["error"]["message"]
