"""Metrics of numbers that a model writes out."""

import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Float

from softprompt.tasks.metrics.base import Answers, Joint, Metric, RowMean


def _as_numbers(answers: Answers) -> tuple[Float[np.ndarray, "row"], Float[np.ndarray, "row"]]:
    """Predictions and golds; a prediction that is not finite becomes the smallest or largest gold, the farther one."""
    golds = np.asarray(answers.golds, dtype=float)
    predictions = np.asarray(answers.predictions, dtype=float)
    farthest = np.where(golds > (golds.min() + golds.max()) / 2, golds.min(), golds.max())
    return np.where(np.isfinite(predictions), predictions, farthest), golds


def _absolute_error(answers: Answers) -> Float[np.ndarray, "row"]:
    predictions, golds = _as_numbers(answers)
    return np.abs(predictions - golds)


def _correlation(name: Literal["pearsonr", "spearmanr"]) -> Callable[[Answers], float]:
    """A correlation by scipy; 0 where predictions or golds are constant, so that none is defined."""

    def correlation(answers: Answers) -> float:
        from scipy import stats

        predictions, golds = _as_numbers(answers)
        if len(golds) < 2 or np.ptp(golds) == 0 or np.ptp(predictions) == 0:
            return 0.0
        with warnings.catch_warnings():
            # Nearly constant predictions: scipy warns that the value is inexact, which the interval shows.
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            return float(getattr(stats, name)(predictions, golds).statistic)

    return correlation


METRICS: Mapping[str, Metric] = {
    "pearson": Joint(answer_kind="numbers", score=_correlation("pearsonr")),
    "spearman": Joint(answer_kind="numbers", score=_correlation("spearmanr")),
    "mae": RowMean(answer_kind="numbers", scores=_absolute_error, zero_or_one=False, lower_is_better=True),
}
"""`mae` is the mean absolute error."""
