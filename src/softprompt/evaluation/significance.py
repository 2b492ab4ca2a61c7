"""Two sets of answers to the same rows: how much worse one scores, and whether that could be chance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import stats

from softprompt.tasks import Answers
from softprompt.tasks.metrics import Column

RESAMPLES = 1000
"""Permutations and bootstrap samples per comparison: a p-value of 0.025 is then accurate to 0.005."""
_BATCH = 100
"""Resamples that scipy holds in memory at a time."""


@final
@dataclass(frozen=True, kw_only=True)
class Drop:
    """The loss in score from one set of answers to another, in the metric's units."""

    value: float
    """The first score minus the second."""
    ci_low: float
    """Lower end of the 95 % interval of `value`, by a bootstrap of rows (of questions, if there are any)."""
    ci_high: float
    """Upper end of the interval."""
    p_value: float
    """Probability of a drop at least this large if the two sets are exchangeable."""

    @property
    def significant(self) -> bool:
        """Whether `p_value` is at most 2.5 %: one side of the usual 5 %, since only a loss is tested for."""
        return self.p_value <= 0.025


def drop(metric: Callable[[Answers], float], before: Answers, after: Answers, seed: int = 0) -> Drop:
    """`metric(before) - metric(after)` on the same rows, with a permutation test and a bootstrap interval.

    Two prompts are right and wrong on nearly the same rows, so the rows on which they differ decide, and two separate
    intervals would hide the difference. The test swaps the two answers of each row (of all rows of a question) at
    random. It is valid for every metric; for accuracy it is McNemar's exact test. The interval is for information: a
    bootstrap finds losses too readily if few rows differ.

    Raises:
        ValueError: unequal numbers of rows.

    Reference: Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; McNemar 1947, "Note on the Sampling
    Error of the Difference Between Correlated Proportions"; Efron 1979, "Bootstrap Methods"; by scipy.
    """
    if len(before.golds) != len(after.golds):
        raise ValueError(f"{len(before.golds)} rows and {len(after.golds)}; compare answers to the same rows")
    first, second, golds = (_column(part) for part in (before.predictions, after.predictions, before.golds))
    value = metric(before) - metric(after)
    if all(left == right for left, right in zip(first.tolist(), second.tolist(), strict=True)):
        return Drop(value=0.0, ci_low=0.0, ci_high=0.0, p_value=1.0)
    units = before.units
    count = int(units.max()) + 1
    if count == 1:  # two orders of its answers, and one resample
        return Drop(value=value, ci_low=value, ci_high=value, p_value=0.5 if value > 0 else 1.0)
    members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])
    has_questions = before.questions is not None

    def score(
        predictions: Shaped[np.ndarray, "row"],
        rows: Int[np.ndarray, "row"],
        questions: Column,
        sample: Answers | None = None,
    ) -> float:
        units_of_rows = questions if has_questions else None
        return metric(Answers(predictions=predictions, golds=golds[rows], questions=units_of_rows, sample=sample))

    def swapped_drop(swap: Float[np.ndarray, "unit"], _: Float[np.ndarray, "unit"]) -> float:
        swapped, rows = swap[units] == 1, np.arange(len(units))
        kept_first, kept_second = np.where(swapped, second, first), np.where(swapped, first, second)
        difference = score(kept_first, rows, units) - score(kept_second, rows, units)
        return round(difference, 12)  # so that drops that differ only by float rounding are equal

    def resampled_drop(drawn: Int[np.ndarray, "unit"]) -> float:
        parts = [members[unit] for unit in drawn]
        rows = np.concatenate(parts)
        # A question that is drawn twice counts as two.
        questions = np.repeat(np.arange(count), [len(part) for part in parts])
        return score(first[rows], rows, questions, before) - score(second[rows], rows, questions, after)

    options = {"n_resamples": RESAMPLES, "batch": _BATCH, "vectorized": False, "rng": np.random.default_rng(seed)}
    # Under the null hypothesis, each unit's pair of answers is exchangeable: 0 is its own order, 1 the swapped one.
    pairs = np.zeros(count), np.ones(count)
    test = stats.permutation_test(pairs, swapped_drop, permutation_type="samples", alternative="greater", **options)
    interval = stats.bootstrap((np.arange(count),), resampled_drop, method="percentile", **options)
    low, high = interval.confidence_interval
    return Drop(value=value, ci_low=float(low), ci_high=float(high), p_value=float(test.pvalue))


def _column(values: Column) -> Shaped[np.ndarray, "row"]:
    """An array of numbers, or an object array if the values are texts or tuples of texts."""
    items = list(values)
    if all(isinstance(value, (int, float, np.number)) for value in items):
        return np.array(items)
    column = np.empty(len(items), dtype=object)
    column[:] = items
    return column
