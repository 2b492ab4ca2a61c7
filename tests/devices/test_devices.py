"""Everything that users do gives the CPU's numbers on another device, without hidden copies between devices."""

from collections.abc import Iterator
from typing import Any

import pytest

MODELS = ("llama", "t5", "bert", "bert_mlm", "vit")
STAGES: dict[str, tuple[str, ...]] = {
    "train": MODELS,
    "evaluate": MODELS,
    "predict": MODELS,
    "serve": MODELS,
    "export": ("llama", "t5", "bert_mlm"),
    "rank": ("llama", "t5", "bert_mlm", "vit"),
    "prompts": ("llama", "t5", "bert_mlm"),
    "together": ("llama",),
}
"""The stages, and the models that go through each."""
TOLERANCE = 3e-4
"""Relative: other kernels sum in another order, which AdamW's division amplifies over five steps; 5e-5 was measured."""
SMALLEST = 1e-2
"""Numbers below it are compared as if they were as large."""


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number or text in nested lists and mappings, with its path."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(item, f"{path}/{key}")
    else:
        yield path, value


def differences(actual: Any, expected: Any, *, drawn: bool) -> list[str]:
    """What differs by more than the tolerance.

    Args:
        drawn: compare drawn tokens too; a GPU's generator draws others.
    """
    values, others = (
        {path: value for path, value in numbers(tree) if drawn or "/drawn" not in path} for tree in (actual, expected)
    )
    if values.keys() != others.keys():
        return [f"only in one of them: {sorted(values.keys() ^ others.keys())[:5]}"]
    found = []
    for path, value in values.items():
        other = others[path]
        if isinstance(value, float) and isinstance(other, float):
            close = abs(value - other) <= TOLERANCE * max(abs(value), abs(other), SMALLEST)
        else:
            close = value == other
        if not close:
            found.append(f"{path}: {value} instead of {other}")
    return found


def stage_of(journeys: dict[str, Any], model: str, stage: str, device: str) -> Any:
    value = journeys[f"{model} {stage} {device}"]
    if isinstance(value, dict) and "error" in value:
        pytest.fail(f"{stage} of {model} on {device}:\n{value['error']}", pytrace=False)
    return value


@pytest.mark.parametrize(("model", "stage"), [(model, stage) for stage, models in STAGES.items() for model in models])
def test_device_gives_the_numbers_of_the_cpu(journeys: dict[str, Any], device: str, model: str, stage: str) -> None:
    expected = stage_of(journeys, model, stage, "cpu")
    assert differences(stage_of(journeys, model, stage, device), expected, drawn=device == "pretend") == []


@pytest.mark.parametrize("model", ["llama", "t5", "bert_mlm", "vit"])
def test_killed_run_resumes_to_the_same_bits(journeys: dict[str, Any], device: str, model: str) -> None:
    assert stage_of(journeys, model, "resume", device) == [True, True, True]


def test_training_is_on_the_device_and_moves_the_loss(journeys: dict[str, Any], device: str) -> None:
    for model in MODELS:
        trained = stage_of(journeys, model, "train", device)
        assert trained["on_device"], "a parameter is on another device than the backbone"
        losses = trained["losses"]
        assert len(losses) == 5
        assert max(losses) - min(losses) > 100 * TOLERANCE


@pytest.mark.parametrize("model", ["llama", "t5", "bert_mlm"])
def test_waits_for_the_device_do_not_grow_with_layers(journeys: dict[str, Any], device: str, model: str) -> None:
    if device != "pretend":
        pytest.skip("only the pretend device counts them")
    once, twice = stage_of(journeys, model, "layers", device)
    assert once == twice
    assert once, "nothing was counted"


def test_no_hidden_copies_and_no_factories_without_a_device(journeys: dict[str, Any], device: str) -> None:
    assert journeys["faults cpu"] == []
    assert journeys[f"faults {device}"] == []


def test_pretend_device_refuses_what_cuda_refuses(journeys: dict[str, Any], device: str) -> None:
    if device != "pretend":
        pytest.skip("it is the pretend device that is tested")
    mistakes = journeys["pretend"]
    assert {name for name, error in mistakes.items() if not error} == {"scalar", "copy"}
    assert all("several devices" in mistakes[name] for name in ("add", "matmul", "cat", "index"))
