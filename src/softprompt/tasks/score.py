"""A split's score: the metric, its interval, the score of the best constant answer, and a warning if it may mislead."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any, Literal, final

from softprompt.tasks.metrics import METRICS, Answers, check_installed
from softprompt.tasks.task import Task

Prediction = int | str | None
"""A class index, a text, or None where the model gave no answer."""

MAJORITY_ROWS = 1000
"""Rows on which constant texts are compared: metrics of texts are slow."""
_TEXT_CANDIDATES = 10

Gold = int | str | tuple[str, ...]
"""A class index, a text, or all accepted texts."""


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a split; all values are fractions."""

    metric: str
    """The name of the task's first metric."""
    value: float
    """Its value."""
    n: int
    """Rows scored."""
    majority: float
    """The score of always giving the best constant answer of the training split, or of the scored rows if better."""
    majority_answer: str
    """That answer."""
    majority_source: Literal["train", "scored rows"]
    """The rows that it was chosen on."""
    ci_low: float
    """Lower end of the 95 % interval of `value`: Wilson's, or that of a seeded bootstrap. If the latter has no width,
    `warning` says so."""
    ci_high: float
    """Upper end of that interval."""
    extra_metrics: dict[str, float] = field(default_factory=dict)
    """The values of the task's other metrics; of `evaluate(generate=True)` also what was generated freely."""
    warning: str | None = None
    """Why the score may mislead: one answer was always given, some could not be read, or the interval has no width."""


def score(
    task: Task,
    predictions: Sequence[Prediction],
    golds: Sequence[Gold],
    questions: Sequence[Any] | None = None,
    *,
    majority: int | str | None,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """Score predictions by the task's metrics.

    A text predicted for a label counts as that label if it is its label word; any other text, and None, is wrong. The
    interval treats rows (questions, in a grouped metric) as independent, so it is too narrow where rows share a film
    or a passage.

    Args:
        task: has the metrics; the first one is the score.
        predictions: a class index or a text for each row.
        golds: class indices, or (tuples of accepted) texts.
        questions: the rows' values of `task.question`, for grouped metrics.
        majority: the best constant answer of the training split, `Splits.majority`; None without a training split.
        resamples: number of bootstrap samples, for metrics without a closed-form interval.
        seed: of the bootstrap.

    Raises:
        ValueError: unequal lengths, no rows, an unknown class index, a row without an accepted text, or no questions
            for a grouped metric.
        ModuleNotFoundError: a metric needs an extra that is not installed.
    """
    check_installed((name, METRICS[name]) for name in task.metrics)
    if questions is None and any(METRICS[name].grouped for name in task.metrics):
        raise ValueError(
            f"task {task.name!r} scores whole questions; give each row's value in the column {task.question!r}"
        )

    def answers(name: str, predictions: Sequence[Prediction]) -> Answers:
        return read_answers(task, name, predictions, golds, questions)

    def constant(answer: int | str) -> float:
        return METRICS[first](answers(first, [answer] * len(golds)))

    first = task.metrics[0]
    read = answers(first, predictions)
    low, high = METRICS[first].interval(read, resamples, seed)
    values = {name: METRICS[name](answers(name, predictions)) for name in task.metrics}
    best = best_constant(task, golds, questions)
    source: Literal["train", "scored rows"] = "scored rows"
    if majority is not None and constant(majority) >= constant(best):
        best, source = majority, "train"
    return Score(
        metric=first,
        value=values.pop(first),
        n=len(golds),
        majority=constant(best),
        majority_answer=_answer_text(task, best),
        majority_source=source,
        ci_low=low,
        ci_high=high,
        extra_metrics=values,
        warning=_warning(task, predictions, read, low == high),
    )


def best_constant(task: Task, golds: Sequence[Gold], questions: Sequence[Any] | None = None) -> int | str:
    """The answer that scores best on these rows if always given; ties go to the most frequent, then to the first.

    Every label is tried, and of texts the most frequent few among all accepted answers, by their score on at most
    MAJORITY_ROWS rows, drawn at random.
    """
    counts = Counter(answer for gold in golds for answer in (set(gold) if isinstance(gold, tuple) else (gold,)))
    by_frequency = sorted(counts, key=lambda answer: (-counts[answer], answer))
    metric = task.metrics[0]
    if metric == "accuracy":
        return by_frequency[0]
    if not task.is_classification:
        by_frequency = by_frequency[:_TEXT_CANDIDATES]
        rows = random.Random(0).sample(range(len(golds)), min(len(golds), MAJORITY_ROWS))
        golds, questions = [golds[row] for row in rows], None if questions is None else [questions[row] for row in rows]

    def value(answer: int | str) -> float:
        return METRICS[metric](read_answers(task, metric, [answer] * len(golds), golds, questions))

    return max(by_frequency, key=value)


def _answer_text(task: Task, answer: Any) -> str:
    return list(task.label_words)[answer] if isinstance(answer, int) and task.is_classification else str(answer)


def _warning(task: Task, predictions: Sequence[Prediction], answers: Answers, is_point: bool) -> str | None:
    count, metric, reasons = len(predictions), METRICS[task.metrics[0]], []
    missing = -1 if metric.answer_kind == "labels" else None
    unreadable = [
        prediction
        for prediction, value in zip(predictions, answers.predictions, strict=True)
        if value == missing or (isinstance(value, float) and not isfinite(value))
    ]
    if unreadable:
        effect = {
            "labels": "match no label word and count as wrong",
            "texts": "are not text and count as wrong",
            "numbers": "are not numbers and count as the target farthest from the row's",
        }[metric.answer_kind]
        reasons.append(f"{len(unreadable)} of {count} answers {effect} (the first is {unreadable[0]!r})")
    elif count > 1 and len(set(answers.predictions)) == 1:
        reasons.append(f"all {count} rows got one answer, {_answer_text(task, answers.predictions[0])!r}")
    if count > 1 and len(set(answers.golds)) == 1:
        gold = answers.golds[0]
        text = _answer_text(task, gold[0] if isinstance(gold, tuple) else gold)
        reasons.append(f"{text!r} is right for all {count} rows")
    if is_point:
        reasons.append("every resample has the same score, so the interval has no width and says nothing")
    return "; ".join(reasons) or None


def read_answers(
    task: Task,
    metric: str,
    predictions: Sequence[Prediction],
    golds: Sequence[Gold],
    questions: Sequence[Any] | None = None,
) -> Answers:
    """Convert predictions and golds to what `METRICS[metric]` compares: class indices, texts or numbers.

    Raises:
        ValueError: as `score`.
    """
    predicted, accepted = _READ[METRICS[metric].answer_kind](task, predictions, golds)
    return Answers(predictions=predicted, golds=accepted, questions=questions)


def _labels(task: Task, predictions: Sequence[Prediction], golds: Sequence[Gold]) -> tuple[list[int], list[int]]:
    count = len(task.label_words)
    for index in [*predictions, *golds]:
        if isinstance(index, int) and not 0 <= index < count:
            raise ValueError(f"class {index} is not one of task {task.name!r}'s; it has classes 0 to {count - 1}")
    classes = [task.classify(answer) if isinstance(answer, str) else answer for answer in predictions]
    if wrong := [gold for gold in golds if not isinstance(gold, int)]:
        raise ValueError(f"the gold answer {wrong[0]!r} of task {task.name!r} is not a class index; give an integer")
    return [-1 if index is None else index for index in classes], [int(gold) for gold in golds if isinstance(gold, int)]


def _texts(
    task: Task, predictions: Sequence[Prediction], golds: Sequence[Gold]
) -> tuple[list[str | None], list[tuple[str, ...]]]:
    if () in golds:
        raise ValueError(
            f"row {list(golds).index(()) + 1} of task {task.name!r} has no accepted answer; give it at least one"
        )
    accepted = [gold if isinstance(gold, tuple) else (str(gold),) for gold in golds]
    return [None if text is None else str(text) for text in predictions], accepted


def _numbers(task: Task, predictions: Sequence[Prediction], golds: Sequence[Gold]) -> tuple[list[float], list[float]]:
    firsts = [gold[0] if isinstance(gold, tuple) else gold for gold in golds]
    values = [_number(gold) for gold in firsts]
    for gold, value in zip(firsts, values, strict=True):
        if isnan(value):
            raise ValueError(
                f"the gold answer {gold!r} of task {task.name!r} is not a number; its metrics need numbers"
            )
    return [_number(text) for text in predictions], values


def _number(text: Prediction) -> float:
    try:
        return float("nan" if text is None else text)
    except ValueError:
        return float("nan")


_READ: dict[str, Callable[..., tuple[Sequence[Any], Sequence[Any]]]] = {
    "labels": _labels,
    "texts": _texts,
    "numbers": _numbers,
}
