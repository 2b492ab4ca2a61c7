"""Inputs that are far too long are refused, or cut, before the tokenizer works on them while others wait."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import normalizers

from softprompt.serve import Engine
from softprompt.serve.api.schemas import ClassifyRequest, CompletionRequest
from softprompt.serve.engine import encode
from softprompt.tasks.data import tokenize

EngineOf = Callable[..., Engine]
LIMIT = 40
CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The characters of each text that the tokenizer gets."""
    sizes: list[int] = []
    call = tokenize._call
    monkeypatch.setattr(
        tokenize,
        "_call",
        lambda tokenizer, texts, *more, **names: (
            sizes.extend(map(len, texts)),
            call(tokenizer, texts, *more, **names),
        )[1],
    )
    return sizes


def test_far_too_long_input_is_refused_before_it_is_tokenized(
    engine_of: EngineOf, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(prompts=1, max_input_tokens=LIMIT)
    backbone, long = engine.backbone, "the fox " * 10_000
    message = "has 80000 characters, more than the .* tokens allowed can have; shorten it"
    with pytest.raises(ValueError, match=f"the input {message}"):
        engine.generate("p0", long)
    with pytest.raises(ValueError, match=f"the input {message}"):
        engine.classify("p0", ["a", long], ["x", "y"])
    with pytest.raises(ValueError, match=f"a label {message}"):
        engine.classify("p0", ["a"], ["x", long])
    monkeypatch.setattr(backbone.tokenizer, "chat_template", CHAT)
    with pytest.raises(ValueError, match=f"the conversation {message}"):
        encode.chat(backbone, [{"role": "user", "content": long}], LIMIT)
    assert not [size for size in tokenized if size > 10_000]


def test_no_input_that_fits_is_refused(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest token as often as it may be; and with a normalizer, characters that it joins."""
    tokenizer = engine_of(prompts=0).backbone.tokenizer
    longest = max((token for token in range(3, 300)), key=lambda token: len(tokenizer.decode([token])))
    text = tokenizer.decode([longest] * LIMIT)
    assert len(text) <= encode._max_characters(tokenizer, LIMIT)
    encode._longest_pieces.pop(tokenizer)
    monkeypatch.setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.NFC())
    joined = "\u03b1\u0313\u0300\u0345"  # one character in NFC
    assert len(joined) * len(text) <= encode._max_characters(tokenizer, LIMIT)
    encode._longest_pieces.pop(tokenizer)


def test_long_row_is_cut_and_then_truncated_as_in_training(
    run_folders: list[Path], engine_of: EngineOf, tokenized: list[int]
) -> None:
    engine = engine_of(prompts=0, max_input_tokens=LIMIT)
    engine.add("run", run_folders[0])
    entry, words = engine.get("run"), "a b c d " * 10_000
    task, tokenizer = entry.task, engine.backbone.tokenizer
    assert task is not None
    [expected] = tokenize.encode(task, tokenizer, [{"text": words}], LIMIT, answers=False)[0]
    tokenized.clear()
    [(ids, _)] = encode.classification(engine.backbone, entry, [{"text": words}], None, LIMIT)
    assert ids == tuple(expected.input_ids)
    assert encode.completion(engine.backbone, entry, {"text": words}, 1, LIMIT) == ids
    assert max(tokenized) < 10_000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [[5]] * 800_000}),
        (CompletionRequest, {"prompt": ["a"] * 800_000}),
        (ClassifyRequest, {"input": ["a"] * 800_000}),
    ],
)
def test_list_of_too_many_inputs_ends_early(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="at most 128 items"):
        kind.model_validate({"model": "p", **body})


def test_time_counts_from_the_arrival(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the tokenizer is a part of it."""
    engine = engine_of(prompts=1, timeout=50.0)
    arrived = time.monotonic() - 49.0
    for request in (
        engine.generate("p0", "a", max_new_tokens=1, arrived=arrived),
        *engine.classify("p0", ["a"], ["x", "y"], arrived=arrived),
    ):
        assert request.deadline == arrived + 50.0
    real = encode.completion
    monkeypatch.setattr(encode, "completion", lambda *arguments: (time.sleep(0.2), real(*arguments))[1])
    before = time.monotonic()
    request = engine.generate("p0", "a", max_new_tokens=1)
    assert request.arrived < before + 0.1
    request.result(30.0)


def test_template_is_tokenized_outside_of_the_engines_thread(
    run_folders: list[Path], engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock may be taken by a long text meanwhile, and texts are still generated."""
    engine = engine_of(prompts=0)
    real = encode.template_prefix

    def template_prefix(*arguments: Any) -> Any:
        assert engine.generate("base", [5, 6], max_new_tokens=2).result(30.0)
        return real(*arguments)

    monkeypatch.setattr(encode, "template_prefix", template_prefix)
    assert engine.add("run", run_folders[0]).name == "run"
