"""A score warns of a degenerate case: one answer for all rows, unreadable answers, or one gold for all rows."""

import dataclasses
import json

import pytest

from softprompt.tasks import Score, Task, score

LABELS = Task(name="t", template="{a}", label="y", label_words={"0": "bad", "1": "good"})
NUMBERS = Task(name="n", template="{a}", target="y", metrics=("pearson",))
TEXTS = Task(name="g", template="{a}", target="y", metrics=("exact_match", "token_f1"))


def score_of(task: Task, metric: str, predictions: list, golds: list, majority: int | str | None = None) -> Score:
    result = score(dataclasses.replace(task, metrics=(metric,)), predictions, golds, majority=majority, resamples=50)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["warning"] == result.warning
    return result


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_constant_answer_voids_the_interval(metric: str) -> None:
    result = score_of(LABELS, metric, [0] * 20, [0, 1] * 10, 0)
    assert (result.value, result.ci_low, result.ci_high) == (0, 0, 0)
    assert result.warning == "all 20 rows got one answer, '0', and its interval says nothing"


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_constant_answer_warns_if_the_interval_is_valid(metric: str) -> None:
    assert score_of(LABELS, metric, [1] * 20, [0, 1] * 10, 0).warning == "all 20 rows got one answer, '1'"


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_number_voids_the_interval(metric: str) -> None:
    result = score_of(NUMBERS, metric, ["2.0"] * 10, [str(i) for i in range(10)])
    assert result.warning == "all 10 rows got one answer, '2.0', and its interval says nothing"


def test_unreadable_answers_are_counted() -> None:
    golds = [str(i) for i in range(10)]
    result = score_of(NUMBERS, "pearson", ["alike", *golds[1:8], "", "nan"], golds)
    assert result.warning == "3 of 10 answers are no number and count as wrong (the first is 'alike')"
    assert score_of(LABELS, "accuracy", ["maybe", "good", 0], [0, 1, 0]).warning == (
        "1 of 3 answers are no label's word and count as wrong (the first is 'maybe')"
    )


def test_constant_text_warns() -> None:
    assert (
        score_of(TEXTS, "exact_match", ["a"] * 5, ["a", "b", "c", "d", "e"]).warning == "all 5 rows got one answer, 'a'"
    )


def test_constant_gold_warns() -> None:
    assert score_of(LABELS, "matthews", [0, 1, 0], [1, 1, 1]).warning == "'1' is right for all 3 rows"


def test_differing_answers_do_not_warn() -> None:
    assert score_of(LABELS, "matthews", [0, 1, 1], [0, 1, 0]).warning is None
    assert score_of(LABELS, "accuracy", [1], [1]).warning is None  # one row has one answer


def test_majority_is_the_better_constant_answer() -> None:
    """The majority of the training split may be a minority of the test split, and then easily beaten."""
    result = score_of(LABELS, "accuracy", [1, 0, 1, 0], [1, 1, 1, 0], 0)
    assert (result.majority, result.majority_answer, result.majority_source) == (0.75, "1", "scored rows")
    tied = score_of(LABELS, "accuracy", [1, 0, 1, 0], [0, 1, 1, 0], 1)  # a tie goes to the training split's
    assert (tied.majority, tied.majority_answer, tied.majority_source) == (0.5, "1", "train")
    texts = score_of(TEXTS, "exact_match", ["x", "y"], [("b", "c"), "b"], "a")
    assert (texts.majority, texts.majority_answer, texts.majority_source) == (1, "b", "scored rows")
