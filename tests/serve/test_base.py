"""The model without a prompt is asked by the name `base`; what is wrong with a request is said in one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from softprompt.models import attach
from softprompt.serve import Engine
from softprompt.tasks import Task, answer_ids, encode

EngineOf = Callable[..., Engine]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert_mlm"])
def test_base_says_what_the_model_says_without_a_prompt(engine_of: EngineOf, name: str) -> None:
    engine = engine_of(name, prompts=2)
    alone = attach(engine.backbone)
    # An encoder's mask holds one token, so the labels are words that have one.
    words = sorted(one[1:] for one in engine.backbone.tokenizer.get_vocab() if len(one) > 1 and one[0] == "Ġ")[:2]
    task = Task(name="t", template="{text}", label="y", label_words=dict(zip("01", words, strict=True)))
    texts = ["a b c", "b"]
    examples = encode(
        task, engine.backbone.tokenizer, [{"text": t} for t in texts], 99, closing=alone.appends_eos, answers=False
    )[0]
    # Beside a prompt's rows, which wait in the same batch.
    others = engine.classify("p1", ["c d e f", "a"], words)
    requests = engine.classify("base", texts, words)
    for example, request in zip(examples, requests, strict=True):
        ids = torch.tensor([example.input_ids])
        expected = alone.score(ids, torch.ones_like(ids), answer_ids(task, engine.backbone.tokenizer))[0]
        torch.testing.assert_close(torch.tensor(request.result(30.0).scores), expected, atol=1e-4, rtol=1e-4)
    assert all(len(other.result(30.0).scores) == 2 for other in others)
    if name == "bert_mlm":
        return
    ids = torch.tensor([examples[0].input_ids])
    ends = set(alone.end_of_sequence())
    said = [int(step[0]) for step in alone.generate(ids, torch.ones_like(ids), max_new_tokens=6)]
    said = said[: next((at for at, token in enumerate(said) if token in ends), len(said))]
    assert list(engine.generate("base", "a b c", max_new_tokens=6).result(30.0).tokens) == said


def test_base_is_no_prompt(engine_of: EngineOf, prompt_of: Callable[..., Any], run_folders: list[Path]) -> None:
    engine = engine_of(prompts=1)
    assert [one.name for one in engine.models] == ["p0", "base"]
    assert [one.name for one in engine.prompts] == ["p0"]
    for change in (
        lambda: engine.add("base", prompt_of(engine.backbone, 1)),
        lambda: engine.add("base", run_folders[0], replace=True),
        lambda: engine.remove("base"),
    ):
        with pytest.raises(ValueError, match="'base' is the model without a prompt, and stays"):
            change()
    with pytest.raises(ValueError, match="prompt 'base' has no labels of its own; send labels"):
        engine.classify("base", ["a"])
    with pytest.raises(ValueError, match="prompt 'base' has no template for a row"):
        engine.generate("base", {"text": "a"})


def test_base_over_http(service: Any) -> None:
    client, openai_client = service.client(), service.openai()
    assert [model.id for model in openai_client.models.list()][-1] == "base"
    assert openai_client.models.retrieve("base").id == "base"
    assert openai_client.completions.create(model="base", prompt="a b", max_tokens=3).usage.prompt_tokens > 0
    answer = client.post("/v1/classify", json={"model": "base", "input": "a", "labels": ["yes", "no"]}).json()
    assert answer["results"][0]["label"] in ("yes", "no")
    refused = client.post("/v1/classify", json={"model": "base", "input": "a"})
    assert (refused.status_code, refused.json()["error"]["message"].count("send labels")) == (400, 1)
    assert service.admin().delete("/v1/prompts/base").status_code == 400
    with pytest.raises(openai.NotFoundError, match="did you mean 'p"):
        openai_client.completions.create(model="p11", prompt="a")
    with pytest.raises(openai.NotFoundError, match="did you mean 'base'"):
        openai_client.completions.create(model="bse", prompt="a")
    with pytest.raises(openai.NotFoundError, match="see the list of prompts"):
        openai_client.completions.create(model="quite another", prompt="a")


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
def test_the_error_is_that_of_the_kind_that_was_meant(service: Any, path: str, body: Any, message: str) -> None:
    answer = service.client().post(f"/v1/{path}", json={"model": "p0", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"


def test_a_body_that_is_no_json_is_said_so(service: Any) -> None:
    header = {"Content-Type": "application/json"}
    answer = service.client().post("/v1/completions", content=b'{"model": "p0", }', headers=header)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("the body is not JSON: ")


ODD = ["\x00", "a\x00b", "\ufffe", "\u202eabc", "שלום עולם", "a" * 3000, " \n\t ", "\u200b", "e\u0301" * 40, "🏳️‍🌈"]


@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_answered_or_refused(service: Any, text: str) -> None:
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
def test_half_a_surrogate_pair_is_refused_in_one_sentence(service: Any, text: str) -> None:
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
