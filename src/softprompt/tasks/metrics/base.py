"""What a metric is: its value, its interval, and the answers that it compares."""

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from jaxtyping import Float, Int, Shaped

Column = Sequence[Any] | Shaped[np.ndarray, "row"]
"""One value per row."""

UnitScores = Callable[["Answers"], Float[np.ndarray, "unit"]]
"""Scores each row, or each question."""


@final
@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predictions and gold answers, row by row.

    Labels are class indices, -1 for a prediction that is not a label. Texts are strings (None: no prediction) against
    tuples of accepted strings. Numbers are floats, NaN for a prediction that is not a number.

    Raises:
        ValueError: unequal lengths, or no rows.
    """

    predictions: Column
    golds: Column
    questions: Column | None = None
    """The question that each row belongs to; None: every row is its own."""
    sample: "Answers | None" = None
    """The answers that these rows were resampled from; None: these are all there are."""

    def __post_init__(self) -> None:
        sizes = {len(column) for column in (self.predictions, self.golds, self.questions) if column is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"{len(self.predictions)} predictions, {len(self.golds)} gold answers and "
                f"{len(self.golds if self.questions is None else self.questions)} questions; give each row one"
            )
        if sizes == {0}:
            raise ValueError("there are no predictions to score; give at least one row")

    @property
    def units(self) -> Int[np.ndarray, "row"]:
        """The index of each row's question."""
        if self.questions is None:
            return np.arange(len(self.golds))
        return np.unique(np.array([str(question) for question in self.questions]), return_inverse=True)[1]

    def take(self, rows: Int[np.ndarray, "drawn"]) -> "Answers":
        """Select rows of labels or numbers, in this order; each becomes its own question."""
        return Answers(predictions=np.asarray(self.predictions)[rows], golds=np.asarray(self.golds)[rows], sample=self)


@dataclass(frozen=True, kw_only=True)
class Metric(ABC):
    """A score with a confidence interval."""

    answer_kind: Literal["labels", "texts", "numbers"]
    """What it compares."""
    binary: bool = False
    """Needs exactly two labels; the second is the positive one."""
    grouped: bool = False
    """Scores questions of several rows."""
    lower_is_better: bool = False
    """Such a metric is only reported: it cannot select a checkpoint."""
    package: str = ""
    """The package of the extra `text-metrics` that computes it, by its import name; empty: none is needed."""

    @abstractmethod
    def __call__(self, answers: Answers) -> float:
        """The score, as a fraction."""

    @abstractmethod
    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """The ends of the 95 % interval."""


@final
@dataclass(frozen=True, kw_only=True)
class RowMean(Metric):
    """The mean score of rows or questions; the interval is Wilson's for scores of 0 or 1, else a bootstrap.

    Where a score between 0 and 1 is 0, or 1, on every row, no resample can differ from it: there the interval is
    Wilson's too. Scores that are equal otherwise give an interval without width.
    """

    scores: UnitScores
    zero_or_one: bool = True
    """Every score is 0 or 1."""

    def __call__(self, answers: Answers) -> float:
        """The mean."""
        return float(self.scores(answers).mean())

    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """Wilson's interval, or the percentiles of resampled means."""
        scores = self.scores(answers)
        all_equal = self.answer_kind != "numbers" and scores[0] in (0, 1) and bool((scores == scores[0]).all())
        if self.zero_or_one or all_equal:
            return wilson(round(float(scores.sum())), len(scores))
        random = np.random.default_rng(seed)
        resampled = [scores[random.integers(len(scores), size=len(scores))].mean() for _ in range(resamples)]
        return _percentiles(resampled, float(scores.mean()))


@final
@dataclass(frozen=True, kw_only=True)
class Joint(Metric):
    """One score of all rows together; the interval is a bootstrap over rows, or over questions if it is grouped.

    It has no width where every resample has the same score, as of answers that are all right: a score of all rows
    together is not a proportion of them (with a rare label, one wrong answer can halve macro F1), so Wilson's interval
    would not be a bound either.
    """

    score: Callable[[Answers], float]

    def __call__(self, answers: Answers) -> float:
        """The score."""
        return self.score(answers)

    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """The percentiles of the score over resampled rows or questions."""
        units = answers.units if self.grouped else np.arange(len(answers.golds))
        members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])
        random = np.random.default_rng(seed)
        draws = (random.integers(len(members), size=len(members)) for _ in range(resamples))
        scores = [self.score(answers.take(np.concatenate([members[unit] for unit in draw]))) for draw in draws]
        return _percentiles(scores, self.score(answers))


@final
@dataclass(frozen=True, kw_only=True)
class Pooled(Metric):
    """A corpus score computed from the sum of the rows' statistics (n-gram counts); the interval is a bootstrap."""

    statistics: Callable[[Answers], Int[np.ndarray, "row statistic"]]
    score: Callable[[Int[np.ndarray, "statistic"]], float]

    def __call__(self, answers: Answers) -> float:
        """The score."""
        return self.score(self.statistics(answers).sum(0))

    def interval(self, answers: Answers, resamples: int, seed: int) -> tuple[float, float]:
        """The percentiles of the score over resampled rows."""
        rows = self.statistics(answers)
        random = np.random.default_rng(seed)
        scores = [self.score(rows[random.integers(len(rows), size=len(rows))].sum(0)) for _ in range(resamples)]
        return _percentiles(scores, self.score(rows.sum(0)))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of `successes` among `n`.

    Reference: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference", by scipy.

    >>> tuple(round(end, 3) for end in wilson(8, 10))
    (0.49, 0.943)
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def check_installed(metrics: Iterable[tuple[str, Metric]]) -> None:
    """Check that the packages of these named metrics are installed.

    Raises:
        ModuleNotFoundError: one is not, with the command that installs it.
    """
    for name, metric in metrics:
        if metric.package and importlib.util.find_spec(metric.package) is None:
            raise ModuleNotFoundError(
                f"the metric {name!r} needs the extra `text-metrics`; install it in softprompt's clone with: "
                "pip install '.[text-metrics]'"
            )


def _percentiles(resampled: Sequence[float], value: float) -> tuple[float, float]:
    """The interval of the resampled scores, widened to contain the score itself where resampling moves them away."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return min(float(low), value), max(float(high), value)
