"""Two sets of answers to the same rows: how much worse one is, and whether that could be chance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Int, Shaped

from softprompt.tasks import Answers
from softprompt.tasks.metrics import Column

RESAMPLES = 1000
"""Swaps and draws a comparison: a chance of 0.025 is then known to 0.005."""


_Places = Int[np.ndarray, "drawn"]


@final
@dataclass(frozen=True, kw_only=True)
class Drop:
    """What is lost from one set of answers to another, in the metric's units."""

    value: float
    """The first score less the second one."""
    low: float
    """Lower end of the 95 % interval of `value`, by a bootstrap of rows (questions, in a grouped metric)."""
    high: float
    p_value: float
    """How often a drop as large comes about if it does not matter which answer is whose."""

    @property
    def shown(self) -> bool:
        """Whether chance is ruled out at 2.5 %: one side of the usual 5 %, since only a loss is looked for."""
        return self.p_value <= 0.025


def drop(metric: Callable[[Answers], float], before: Answers, after: Answers, seed: int = 0) -> Drop:
    """`metric(before) - metric(after)` on the same rows, with a randomisation test and a bootstrap interval.

    Two prompts that answer the same rows are right and wrong on nearly the same ones, so the rows where they differ
    decide, and two separate intervals would hide what these show. In the test, the two answers of each row are swapped
    by the toss of a coin: it holds for every metric, and for accuracy it is McNemar's exact test. The interval is for
    reading only: a bootstrap finds losses too readily where few rows differ.

    Raises:
        ValueError: unequal numbers of rows.

    Reference: Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; McNemar 1947, "Note on the Sampling
    Error of the Difference Between Correlated Proportions"; Efron 1979, "Bootstrap Methods".
    """
    if len(before.golds) != len(after.golds):
        raise ValueError(f"{len(before.golds)} rows and {len(after.golds)}; compare answers to the same rows")
    first, second, golds = (_column(part) for part in (before.predictions, after.predictions, before.golds))
    value = metric(before) - metric(after)
    if all(one == other for one, other in zip(first.tolist(), second.tolist(), strict=True)):
        return Drop(value=0.0, low=0.0, high=0.0, p_value=1.0)
    random, units = np.random.default_rng(seed), before.units
    count, everywhere = int(units.max()) + 1, np.arange(len(units))

    def difference(rows: _Places, swap: Bool[np.ndarray, "drawn"], questions: _Places) -> float:
        grouped = None if before.questions is None else questions
        ours, theirs = first[rows], second[rows]
        one, other = (
            metric(Answers(predictions=side, golds=golds[rows], questions=grouped))
            for side in (np.where(swap, theirs, ours), np.where(swap, ours, theirs))
        )
        return one - other

    swaps = [difference(everywhere, (random.random(count) < 0.5)[units], units) for _ in range(RESAMPLES)]
    members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])
    draws = []
    for _ in range(RESAMPLES):
        parts = [members[unit] for unit in random.integers(count, size=count)]
        # A question that is drawn twice counts as two.
        questions = np.repeat(np.arange(count), [len(part) for part in parts])
        draws.append(difference(np.concatenate(parts), np.zeros(len(questions), bool), questions))
    low, high = np.percentile(draws, [2.5, 97.5])
    # The observed arrangement is one of them; 1e-12: equal drops that rounding tells apart.
    p_value = (1 + sum(found >= value - 1e-12 for found in swaps)) / (RESAMPLES + 1)
    return Drop(value=value, low=float(low), high=float(high), p_value=p_value)


def _column(values: Column) -> Shaped[np.ndarray, "row"]:
    """An array of numbers, or one object a row: a text or a tuple of texts stays what it is."""
    given = list(values)
    if all(isinstance(value, (int, float, np.number)) for value in given):
        return np.array(given)
    column = np.empty(len(given), dtype=object)
    column[:] = given
    return column
