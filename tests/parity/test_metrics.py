"""Metrics against scikit-learn, scipy and cases counted by hand."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from softprompt.tasks import METRICS, Answers, Task, score
from softprompt.tasks.metrics import wilson
from softprompt.tasks.metrics.texts import normalize

LABELS = Task(
    name="labels",
    template="{text}",
    label="label",
    label_words={"a": "apple", "b": "banana", "c": "cherry"},
    metrics=("macro_f1", "accuracy", "matthews"),
)
PAIRS = dataclasses.replace(
    LABELS, label_words={"n": "no", "y": "yes"}, question="q", metrics=("f1a", "question_match", "f1")
)
TEXTS = Task(name="texts", template="{text}", target="out", metrics=("token_f1", "exact_match"))
NUMBERS = dataclasses.replace(TEXTS, name="numbers", metrics=("pearson", "spearman"))


def draw(classes: int, n: int, seed: int) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(seed)
    golds = random.integers(classes, size=n)
    noisy = np.where(random.random(n) < 0.6, golds, random.integers(classes, size=n))
    return [int(one) for one in noisy], [int(one) for one in golds]


@pytest.mark.parametrize("seed", range(5))
def test_label_metrics_are_scikit_learns(seed: int) -> None:
    """To 1e-12: the same library computes both, so only the way there could differ."""
    ours, golds = draw(3, 200, seed)
    answers = Answers(predictions=ours, golds=golds)
    assert METRICS["accuracy"](answers) == pytest.approx(sklearn.accuracy_score(golds, ours), abs=1e-12)
    assert METRICS["macro_f1"](answers) == pytest.approx(sklearn.f1_score(golds, ours, average="macro"), abs=1e-12)
    assert METRICS["matthews"](answers) == pytest.approx(sklearn.matthews_corrcoef(golds, ours), abs=1e-12)
    ours, golds = draw(2, 200, seed)
    answers = Answers(predictions=ours, golds=golds)
    assert METRICS["f1"](answers) == pytest.approx(sklearn.f1_score(golds, ours), abs=1e-12)
    assert METRICS["f1a"](answers) == pytest.approx(sklearn.f1_score(golds, ours), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed: int) -> None:
    random = np.random.default_rng(seed)
    golds = random.random(100) * 5
    ours = golds + random.normal(size=100)
    answers = Answers(predictions=list(ours), golds=list(golds))
    assert METRICS["pearson"](answers) == pytest.approx(np.corrcoef(ours, golds)[0, 1], abs=1e-12)
    assert METRICS["spearman"](answers) == pytest.approx(stats.spearmanr(ours, golds).statistic, abs=1e-12)


def test_what_is_no_number_is_wrong() -> None:
    golds = ["0", "1", "2", "3", "4"]
    right = score(NUMBERS, golds, golds, majority="2")
    assert right.value == pytest.approx(1.0)
    assert right.majority == 0.0
    for strange in (None, "four", "nan", "inf"):
        wrong = score(NUMBERS, [*golds[:4], strange], golds, majority="2")
        assert wrong.value == pytest.approx(np.corrcoef([0, 1, 2, 3, 0], [0, 1, 2, 3, 4])[0, 1])
    with pytest.raises(ValueError, match="gold answer 'x' of task 'numbers' is not a number"):
        score(NUMBERS, golds, [*golds[:4], "x"], majority="2")


def test_questions_are_right_as_a_whole() -> None:
    """All of q1 and q3 are right; in q2 one answer is wrong and one cannot be read; in q4 one of two is wrong."""
    questions = ["q1", "q2", "q1", "q3", "q2", "q2", "q4", "q4"]
    golds = [1, 1, 0, 1, 0, 1, 0, 0]
    ours = [1, 0, 0, 1, 0, None, 0, 1]
    found = score(PAIRS, ours, golds, questions, majority=1)
    assert found.extra_metrics["question_match"] == pytest.approx(2 / 4)
    # 2 true positives, 1 false one, 2 missed
    assert found.value == found.extra_metrics["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert found.majority == pytest.approx(2 * 4 / (2 * 4 + 4))
    assert found.n == 8
    with pytest.raises(ValueError, match="scores whole questions; give each row's value in the column 'q'"):
        score(PAIRS, ours, golds, majority=1)


def test_questions_are_resampled_whole() -> None:
    """Twenty questions of ten equal rows are twenty facts, not two hundred: the interval is as wide as theirs."""
    ours, golds = draw(2, 20, 1)
    names = list(range(20))
    alone = score(PAIRS, ours, golds, names, majority=1, resamples=200)
    repeated = score(PAIRS, ours * 10, golds * 10, names * 10, majority=1, resamples=200)
    assert (repeated.ci_low, repeated.ci_high) == pytest.approx((alone.ci_low, alone.ci_high), abs=1e-12)
    split = score(PAIRS, ours * 10, golds * 10, list(range(200)), majority=1, resamples=200)
    assert split.ci_high - split.ci_low < 0.6 * (alone.ci_high - alone.ci_low)


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "overlap"),
    [
        ("The cat!", ("a cat",), 1.0, 1.0),
        ("black cat", ("cat",), 0.0, 2 * 1 / 3),
        ("black cat", ("dog", "Black Cat."), 1.0, 1.0),
        ("dog dog", ("dog",), 0.0, 2 * 1 / 3),
        ("", ("cat",), 0.0, 0.0),
        (None, ("the",), 0.0, 0.0),
        ("the", ("a",), 0.0, 0.0),
        ("", ("A",), 0.0, 0.0),
        ("", ("?",), 0.0, 0.0),
        ("+", ("-",), 0.0, 0.0),
        (":)", (":(",), 0.0, 0.0),
        ("C", ("C++",), 0.0, 0.0),
        ("3.5", ("35",), 0.0, 0.0),
        ("-5", ("5",), 0.0, 0.0),
        ("a + b", ("a - b",), 0.0, 2 / 3),
        ("1,000.", ("1000",), 1.0, 1.0),
        ("**3.5**", ("3.5",), 1.0, 1.0),
        ("vitamin A", ("Vitamin",), 0.0, 2 / 3),
    ],
)
def test_texts_are_equal_where_they_mean_the_same(
    prediction: str | None, golds: tuple[str, ...], exact: float, overlap: float
) -> None:
    answers = Answers(predictions=[prediction], golds=[golds])
    assert METRICS["exact_match"](answers) == exact
    assert METRICS["token_f1"](answers) == pytest.approx(overlap)


def test_normalize_keeps_words_that_contain_an_article() -> None:
    assert normalize("Another theme, an ant: the end.") == "another theme ant end"


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (7, 10), (10, 10), (812, 1000)])
def test_wilson_is_its_formula(successes: int, n: int) -> None:
    z = stats.norm.ppf(0.975)
    p = successes / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(successes, n) == pytest.approx((middle - half, middle + half), abs=1e-9)


def test_a_bootstrap_is_seeded_and_agrees_with_wilson() -> None:
    """Of a mean of many 0/1 values the two intervals agree to about a hundredth."""
    ours, golds = draw(2, 400, 3)
    texts = [str(one) for one in ours], [str(one) for one in golds]
    first = score(TEXTS, *texts, majority="1")
    assert first == score(TEXTS, *texts, majority="1")
    assert first.ci_low < first.value < first.ci_high
    accuracy = score(dataclasses.replace(PAIRS, metrics=("accuracy",)), ours, golds, majority=1)
    assert (first.ci_low, first.ci_high) == pytest.approx((accuracy.ci_low, accuracy.ci_high), abs=0.015)
    whole = score(dataclasses.replace(PAIRS, metrics=("f1",)), ours, golds, majority=1, resamples=200)
    assert whole.ci_low < whole.value < whole.ci_high


@pytest.mark.parametrize("rare", [2, 8, 20])
def test_interval_of_macro_f1_contains_it_with_rare_labels(rare: int) -> None:
    """A resample that happens to lack a label would be scored without the one that is always wrong."""
    golds = [*range(rare), *[rare] * 20 * rare]
    constant = Answers(predictions=[rare] * len(golds), golds=golds)
    metric = METRICS["macro_f1"]
    low, high = metric.interval(constant, 300, 0)
    assert low <= metric(constant) <= high < metric(constant) + 0.01
    right = Answers(predictions=golds, golds=golds)
    assert metric.interval(right, 300, 0)[1] == metric(right) == 1


def test_the_majority_is_scored_by_the_same_metric() -> None:
    golds = [0, 0, 0, 1, 2, 2]
    for majority, best, source in ((2, 0, "scored rows"), (0, 0, "train"), (None, 0, "scored rows")):
        found = score(LABELS, golds, golds, majority=majority, resamples=20)
        assert found.value == found.extra_metrics["accuracy"] == 1.0
        assert found.majority == pytest.approx(sklearn.f1_score(golds, [best] * 6, average="macro"))
        assert (found.majority_answer, found.majority_source) == (list(LABELS.label_words)[best], source)


def test_a_text_is_its_label_or_wrong() -> None:
    task = dataclasses.replace(LABELS, metrics=("accuracy", "macro_f1"))
    found = score(task, [" Apple", "banana\n", "pear", None, 2], [0, 1, 2, 2, 2], majority=2)
    assert found.value == pytest.approx(3 / 5)
    # the two wrong ones cost cherry's recall, and are no class of their own
    assert found.extra_metrics["macro_f1"] == pytest.approx((1 + 1 + 2 * 1 / (2 * 1 + 2)) / 3)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions, 1 gold answers"):
        score(LABELS, [0, 1], [0], majority=0)
    with pytest.raises(ValueError, match="no predictions to score"):
        score(LABELS, [], [], majority=0)
    with pytest.raises(ValueError, match="class 3 is not one of task 'labels'"):
        score(LABELS, [3], [0], majority=0)
    with pytest.raises(ValueError, match="gold answer 'apple' of task 'labels' is not a class index"):
        score(LABELS, [0], ["apple"], majority=0)
