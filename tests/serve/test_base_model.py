"""Requests to the model without a prompt, whose name is `base`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from softprompt.models import attach
from softprompt.serve import Engine
from softprompt.tasks import Task
from softprompt.tasks.data.tokenize import answer_ids, encode

EngineOf = Callable[..., Engine]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert_mlm"])
def test_base_answers_as_the_zero_shot_model(engine_of: EngineOf, name: str) -> None:
    engine = engine_of(name, prompts=2)
    prompted = attach(engine.backbone)
    # An encoder's mask holds one token, so the labels are words of one token.
    vocabulary = engine.backbone.tokenizer.get_vocab()
    words = sorted(token[1:] for token in vocabulary if len(token) > 1 and token[0] == "Ġ")[:2]
    task = Task(name="t", template="{text}", label="y", label_words=dict(zip("01", words, strict=True)))
    texts = ["a b c", "b"]
    examples = encode(
        task,
        engine.backbone.tokenizer,
        [{"text": t} for t in texts],
        99,
        appends_eos=prompted.appends_eos,
        answers=False,
    )[0]
    # In one batch with rows of a prompt.
    others = engine.classify("p1", ["c d e f", "a"], words)
    requests = engine.classify("base", texts, words)
    for example, request in zip(examples, requests, strict=True):
        ids = torch.tensor([example.input_ids])
        expected = prompted.score(ids, torch.ones_like(ids), answer_ids(task, engine.backbone.tokenizer))[0]
        torch.testing.assert_close(torch.tensor(request.result(30.0).logprobs), expected, atol=1e-4, rtol=1e-4)
    assert all(len(other.result(30.0).logprobs) == 2 for other in others)
    if name == "bert_mlm":
        return
    ids = torch.tensor([examples[0].input_ids])
    ends = set(prompted.end_of_sequence())
    tokens = [int(step[0]) for step in prompted.generate(ids, torch.ones_like(ids), max_new_tokens=6)]
    tokens = tokens[: next((index for index, token in enumerate(tokens) if token in ends), len(tokens))]
    assert list(engine.generate("base", "a b c", max_new_tokens=6).result(30.0).tokens) == tokens


def test_base_cannot_be_changed(engine_of: EngineOf, prompt_of: Callable[..., Any], run_folders: list[Path]) -> None:
    engine = engine_of(prompts=1)
    assert [entry.name for entry in engine.models] == ["p0", "base"]
    assert [entry.name for entry in engine.prompts] == ["p0"]
    for change in (
        lambda: engine.add("base", prompt_of(engine.backbone, 1)),
        lambda: engine.add("base", run_folders[0], replace=True),
        lambda: engine.remove("base"),
    ):
        with pytest.raises(ValueError, match="'base' is the model without a prompt and cannot be changed"):
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
