"""A score warns of a degenerate case: one answer for all rows, unreadable answers, or one gold for all rows."""

import dataclasses
import json
import sys

import pytest

from softprompt.tasks import Score, Task, score

scores = sys.modules["softprompt.tasks.score"]  # `softprompt.tasks.score` itself is the function

LABELS = Task(name="t", template="{a}", label="y", label_words={"0": "bad", "1": "good"})
NUMBERS = Task(name="n", template="{a}", target="y", metrics=("pearson",))
TEXTS = Task(name="g", template="{a}", target="y", metrics=("exact_match", "token_f1"))

NO_WIDTH = "every resample has the same score, so the interval has no width and says nothing"


def score_of(task: Task, metric: str, predictions: list, golds: list, majority: int | str | None = None) -> Score:
    result = score(dataclasses.replace(task, metrics=(metric,)), predictions, golds, majority=majority, resamples=50)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["warning"] == result.warning
    return result


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_constant_answer_voids_the_interval(metric: str) -> None:
    result = score_of(LABELS, metric, [0] * 20, [0, 1] * 10, 0)
    assert (result.value, result.ci_low, result.ci_high) == (0, 0, 0)
    assert result.warning == f"all 20 rows got one answer, '0'; {NO_WIDTH}"


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_constant_answer_warns_if_the_interval_is_valid(metric: str) -> None:
    assert score_of(LABELS, metric, [1] * 20, [0, 1] * 10, 0).warning == "all 20 rows got one answer, '1'"


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_constant_number_voids_the_interval(metric: str) -> None:
    result = score_of(NUMBERS, metric, ["2.0"] * 10, [str(i) for i in range(10)])
    assert result.warning == f"all 10 rows got one answer, '2.0'; {NO_WIDTH}"


def test_unreadable_answers_are_counted() -> None:
    golds = [str(i) for i in range(10)]
    result = score_of(NUMBERS, "pearson", ["alike", *golds[1:8], "", "nan"], golds)
    assert (
        result.warning
        == "3 of 10 answers are not numbers and count as the target farthest from the row's (the first is 'alike')"
    )
    assert score_of(LABELS, "accuracy", ["maybe", "good", 0], [0, 1, 0]).warning == (
        "1 of 3 answers match no label word and count as wrong (the first is 'maybe')"
    )


def test_constant_text_warns() -> None:
    assert (
        score_of(TEXTS, "exact_match", ["a"] * 5, ["a", "b", "c", "d", "e"]).warning == "all 5 rows got one answer, 'a'"
    )


def test_constant_gold_warns() -> None:
    result = score_of(LABELS, "matthews", [0, 1, 0], [1, 1, 1])
    assert result.warning == f"'1' is right for all 3 rows; {NO_WIDTH}"


@pytest.mark.parametrize("metric", ["macro_f1", "matthews"])
def test_perfect_answers_warn_of_an_interval_without_width(metric: str) -> None:
    result = score_of(LABELS, metric, [0, 1] * 20, [0, 1] * 20, 0)
    assert (result.value, result.ci_low, result.ci_high, result.warning) == (1, 1, 1, NO_WIDTH)


@pytest.mark.parametrize("answer", ["right", "wrong"])
def test_equal_overlaps_of_0_or_1_have_wilsons_interval(answer: str) -> None:
    exact = score_of(TEXTS, "exact_match", [answer, answer, f"the {answer}"], ["right"] * 3)
    overlap = score_of(TEXTS, "token_f1", [answer, answer, f"the {answer}"], ["right"] * 3)
    assert (overlap.ci_low, overlap.ci_high) == (exact.ci_low, exact.ci_high)
    assert overlap.ci_high - overlap.ci_low > 0.5
    assert NO_WIDTH not in (overlap.warning or "")


def test_equal_overlaps_between_0_and_1_warn() -> None:
    result = score_of(TEXTS, "token_f1", ["k m", "n p"], ["m q", "p r"])
    assert result.ci_low == result.ci_high == result.value
    assert result.warning == NO_WIDTH


def test_differing_answers_do_not_warn() -> None:
    assert score_of(LABELS, "matthews", [0, 1, 1], [0, 1, 0]).warning is None
    assert score_of(LABELS, "accuracy", [1], [1]).warning is None  # one row has one answer


def test_majority_is_the_better_constant_answer() -> None:
    """The majority of the training split may be a minority of the test split, and then easily beaten."""
    result = score_of(LABELS, "accuracy", [1, 0, 1, 0], [1, 1, 1, 0], 0)
    assert (result.majority, result.majority_answer, result.majority_source) == (0.75, "1", "scored rows")
    tied = score_of(LABELS, "accuracy", [1, 0, 1, 0], [0, 1, 1, 0], 1)  # a tie goes to the training split's
    assert (tied.majority, tied.majority_answer, tied.majority_source) == (0.5, "1", "train")
    texts = score_of(TEXTS, "exact_match", ["x", "y"], [("a", "b"), "b"], "c")
    assert (texts.majority, texts.majority_answer, texts.majority_source) == (1, "b", "scored rows")


def test_majority_text_is_the_best_by_the_metric_over_all_accepted_answers() -> None:
    """Spellings that the metric does not tell apart count together, and a second accepted answer as the first."""
    golds = [*["Yes"] * 2, *["yes."] * 2, *["no"] * 3]
    result = score_of(TEXTS, "exact_match", ["x"] * 7, golds)
    assert (result.majority, result.majority_answer) == (pytest.approx(4 / 7), "Yes")
    second = score_of(TEXTS, "exact_match", ["x"] * 3, [("a", "d"), ("b", "d"), ("c", "d")])
    assert (second.majority, second.majority_answer) == (1, "d")


def test_constant_texts_are_compared_on_some_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric of texts takes up to a millisecond per row."""
    monkeypatch.setattr(scores, "MAJORITY_ROWS", 10)
    read, counts = scores.read_answers, []
    monkeypatch.setattr(scores, "read_answers", lambda *args: counts.append(len(args[2])) or read(*args))
    assert scores.best_constant(TEXTS, ["k m"] * 70 + ["k n", "k p", "q"] * 10) == "k m"
    assert counts == [10] * 4
