"""A score that says less than it seems to says so: one answer for all, none that can be read, one that is right."""

import dataclasses
import json

import pytest

from softprompt.tasks import Score, Task, score

LABELS = Task(name="t", template="{a}", label="y", label_words={"0": "bad", "1": "good"})
NUMBERS = Task(name="n", template="{a}", target="y", metrics=("pearson",))
TEXTS = Task(name="g", template="{a}", target="y", metrics=("exact_match", "token_f1"))


def of(task: Task, metric: str, given: list, golds: list, majority: int | str | None = None) -> Score:
    found = score(dataclasses.replace(task, metrics=(metric,)), given, golds, majority=majority, resamples=50)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["warning"] == found.warning
    return found


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_a_constant_answer_is_no_certain_score(metric: str) -> None:
    found = of(LABELS, metric, [0] * 20, [0, 1] * 10, 0)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.warning == "all 20 rows got one answer, '0', and its interval says nothing"


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_constant_answer_is_told_of_where_the_interval_is_one(metric: str) -> None:
    assert of(LABELS, metric, [1] * 20, [0, 1] * 10, 0).warning == "all 20 rows got one answer, '1'"


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_a_constant_number_tells_no_row_from_another(metric: str) -> None:
    found = of(NUMBERS, metric, ["2.0"] * 10, [str(i) for i in range(10)])
    assert found.warning == "all 10 rows got one answer, '2.0', and its interval says nothing"


def test_answers_that_cannot_be_read_are_counted() -> None:
    golds = [str(i) for i in range(10)]
    found = of(NUMBERS, "pearson", ["alike", *golds[1:8], "", "nan"], golds)
    assert found.warning == "3 of 10 answers are no number and count as wrong (the first is 'alike')"
    assert of(LABELS, "accuracy", ["maybe", "good", 0], [0, 1, 0]).warning == (
        "1 of 3 answers are no label's word and count as wrong (the first is 'maybe')"
    )


def test_one_text_for_all_rows() -> None:
    assert of(TEXTS, "exact_match", ["a"] * 5, ["a", "b", "c", "d", "e"]).warning == "all 5 rows got one answer, 'a'"


def test_rows_with_one_right_answer() -> None:
    assert of(LABELS, "matthews", [0, 1, 0], [1, 1, 1]).warning == "'1' is right for all 3 rows"


def test_answers_that_differ_are_no_matter() -> None:
    assert of(LABELS, "matthews", [0, 1, 1], [0, 1, 0]).warning is None
    assert of(LABELS, "accuracy", [1], [1]).warning is None  # one row has one answer


def test_the_constant_answer_to_beat_is_the_better_one() -> None:
    """A test split may be turned round: what was commonest in training is easily beaten there."""
    found = of(LABELS, "accuracy", [1, 0, 1, 0], [1, 1, 1, 0], 0)
    assert (found.majority, found.majority_answer, found.majority_source) == (0.75, "1", "scored rows")
    kept = of(LABELS, "accuracy", [1, 0, 1, 0], [0, 1, 1, 0], 1)  # of equal ones the training split's
    assert (kept.majority, kept.majority_answer, kept.majority_source) == (0.5, "1", "train")
    text = of(TEXTS, "exact_match", ["x", "y"], [("b", "c"), "b"], "a")
    assert (text.majority, text.majority_answer, text.majority_source) == (1, "b", "scored rows")
