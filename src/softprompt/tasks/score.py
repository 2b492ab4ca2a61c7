"""A split's score: the metric, what the best constant answer would score, an interval, and what makes it worthless."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, final

from softprompt.tasks.metrics import METRICS, Answers, Mean
from softprompt.tasks.task import Task

Prediction = int | str | None
"""A class's index, a text, or nothing that could be read as an answer."""


@final
@dataclass(frozen=True, kw_only=True)
class Score:
    """What a split scored, all as fractions."""

    metric: str
    value: float
    n: int
    """Rows scored."""
    majority: float
    """The same metric of the best constant answer: the training split's, or that of the rows scored if it is better."""
    majority_answer: str
    """Which answer that is."""
    majority_source: Literal["train", "scored rows"]
    """Which rows it is the best constant answer of."""
    low: float
    """Lower end of the 95 % interval of `value`: Wilson's, or a seeded bootstrap's."""
    high: float
    others: dict[str, float] = field(default_factory=dict)
    """The task's further metrics."""
    warning: str | None = None
    """Why the score says less than it seems to: one answer was always given, or some could not be read."""


def score(
    task: Task,
    predictions: Sequence[Prediction],
    golds: Sequence[int | str | tuple[str, ...]],
    questions: Sequence[Any] | None = None,
    *,
    majority: int | str | None,
    resamples: int = 1000,
    seed: int = 0,
) -> Score:
    """Score predictions by the task's metrics.

    A text given for a label is that label if it is its word; any other text, and none, is wrong. The interval treats
    rows (questions, in a grouped metric) as independent, so it is too narrow where rows share a film or a passage.

    Args:
        task: says the metrics; the first one is the score.
        predictions: class indices or texts, one a row.
        golds: class indices, or (tuples of accepted) texts.
        questions: the rows' values of `task.question`, for grouped metrics.
        majority: the training split's best constant answer, `Splits.majority`; none: there is no training split.
        resamples: of the bootstrap, in those metrics that need one.
        seed: of the bootstrap.

    Raises:
        ValueError: unequal lengths, no rows, a class index that the task has not, or no questions for a grouped metric.
    """
    if questions is None and any(METRICS[name].grouped for name in task.metrics):
        raise ValueError(
            f"task {task.name!r} scores whole questions; give each row's value in the column {task.question!r}"
        )

    def answers(name: str, given: Sequence[Prediction]) -> Answers:
        return read_answers(task, name, given, golds, questions)

    def constant(answer: int | str) -> float:
        return METRICS[first](answers(first, [answer] * len(golds)))

    first = task.metrics[0]
    read = answers(first, predictions)
    low, high = METRICS[first].interval(read, resamples, seed)
    values = {name: METRICS[name](answers(name, predictions)) for name in task.metrics}
    own = best_constant(task, golds, questions)
    known = own if majority is None else majority
    is_own = majority is None or constant(own) > constant(known)
    best = own if is_own else known
    return Score(
        metric=first,
        value=values.pop(first),
        n=len(golds),
        majority=constant(best),
        majority_answer=_shown(task, best),
        majority_source="scored rows" if is_own else "train",
        low=low,
        high=high,
        others=values,
        warning=_warning(task, predictions, read, low == high),
    )


def best_constant(
    task: Task, golds: Sequence[int | str | tuple[str, ...]], questions: Sequence[Any] | None = None
) -> int | str:
    """The answer that scores best on these rows if it is always given; of equal ones the commonest, then the first."""
    counts = Counter(gold[0] if isinstance(gold, tuple) else gold for gold in golds)
    commonest = sorted(counts, key=lambda answer: (-counts[answer], answer))
    metric = task.metrics[0]
    if not task.is_classification or metric == "accuracy":
        return commonest[0]

    def value(answer: int | str) -> float:
        return METRICS[metric](read_answers(task, metric, [answer] * len(golds), golds, questions))

    return max(commonest, key=value)


def _shown(task: Task, answer: Any) -> str:
    return list(task.label_words)[answer] if isinstance(answer, int) and task.is_classification else str(answer)


def _warning(task: Task, predictions: Sequence[Prediction], read: Answers, is_point: bool) -> str | None:
    """What a reader of the number has to know, in one clause."""
    count, metric, said = len(predictions), METRICS[task.metrics[0]], []
    pairs = zip(predictions, read.predictions, strict=True)
    nothing = -1 if metric.of == "labels" else None
    unread = [given for given, one in pairs if one == nothing or (isinstance(one, float) and not isfinite(one))]
    if unread:
        kind = {"labels": "label's word", "texts": "text", "numbers": "number"}[metric.of]
        said.append(f"{len(unread)} of {count} answers are no {kind} and count as wrong (the first is {unread[0]!r})")
    elif count > 1 and len(set(read.predictions)) == 1:
        interval = ", and its interval says nothing" if is_point and not isinstance(metric, Mean) else ""
        said.append(f"all {count} rows got one answer, {_shown(task, read.predictions[0])!r}{interval}")
    if count > 1 and len(set(read.golds)) == 1:
        gold = read.golds[0]
        said.append(f"{_shown(task, gold[0] if isinstance(gold, tuple) else gold)!r} is right for all {count} rows")
    return "; ".join(said) or None


def read_answers(
    task: Task,
    metric: str,
    predictions: Sequence[Prediction],
    golds: Sequence[int | str | tuple[str, ...]],
    questions: Sequence[Any] | None = None,
) -> Answers:
    """Predictions and golds as `METRICS[metric]` compares them: class indices, texts or numbers; raises as `score`."""
    ours, theirs = _READ[METRICS[metric].of](task, predictions, golds)
    return Answers(predictions=ours, golds=theirs, questions=questions)


def _labels(
    task: Task, predictions: Sequence[Prediction], golds: Sequence[int | str | tuple[str, ...]]
) -> tuple[list[int], list[int]]:
    count = len(task.label_words)
    for index in [*predictions, *golds]:
        if isinstance(index, int) and not 0 <= index < count:
            raise ValueError(f"class {index} is none of task {task.name!r}; it has classes 0 to {count - 1}")
    read = [task.classify(given) if isinstance(given, str) else given for given in predictions]
    if strange := [gold for gold in golds if not isinstance(gold, int)]:
        raise ValueError(f"the gold answer {strange[0]!r} of task {task.name!r} is no class index; give an integer")
    return [-1 if given is None else given for given in read], [int(gold) for gold in golds if isinstance(gold, int)]


def _texts(
    task: Task, predictions: Sequence[Prediction], golds: Sequence[int | str | tuple[str, ...]]
) -> tuple[list[str | None], list[tuple[str, ...]]]:
    accepted = [gold if isinstance(gold, tuple) else (str(gold),) for gold in golds]
    return [None if given is None else str(given) for given in predictions], accepted


def _numbers(
    task: Task, predictions: Sequence[Prediction], golds: Sequence[int | str | tuple[str, ...]]
) -> tuple[list[float], list[float]]:
    firsts = [gold[0] if isinstance(gold, tuple) else gold for gold in golds]
    values = [_number(gold) for gold in firsts]
    if any(value != value for value in values):
        wrong = next(gold for gold, value in zip(firsts, values, strict=True) if value != value)
        raise ValueError(f"the gold answer {wrong!r} of task {task.name!r} is no number; its metrics need numbers")
    return [_number(given) for given in predictions], values


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
