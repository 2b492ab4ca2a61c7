"""Requests that cannot be answered: one sentence names the field and what it should be."""

from typing import Any

import httpx
import pytest


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
        ("completions", {"prompt": "a", "logprobs": 2}, "logprobs is not supported; leave it out"),
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
