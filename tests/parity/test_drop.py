"""The drop between two sets of answers equals McNemar's exact test and the definition."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from softprompt.analysis.rank import Drop, drop
from softprompt.tasks import METRICS, Answers


def labels(predictions: Any, golds: Any, questions: Any = None) -> Answers:
    return Answers(predictions=list(predictions), golds=list(golds), questions=questions)


@pytest.mark.parametrize(("lost", "won"), [(8, 1), (6, 0), (5, 0), (3, 3), (0, 4), (20, 6)])
def test_p_value_equals_mcnemars(lost: int, won: int) -> None:
    golds = np.ones(100, int)
    before, after = golds.copy(), golds.copy()
    after[:lost], before[lost : lost + won] = 0, 0
    result = drop(METRICS["accuracy"], labels(before, golds), labels(after, golds))
    exact = stats.binomtest(lost, lost + won, alternative="greater").pvalue
    # 1,000 tosses: three standard errors of a share of one half are 0.047, and of 0.016 they are 0.012.
    assert result.p_value == pytest.approx(exact, abs=3 * np.sqrt(max(exact * (1 - exact), 0.001) / 1000) + 0.001)
    assert result.value == pytest.approx((lost - won) / 100)
    assert result.ci_low <= result.value <= result.ci_high
    assert result.significant == (exact <= 0.025)


def test_interval_width_of_a_mean_difference() -> None:
    draw = np.random.default_rng(0)
    golds = np.ones(400, int)
    before, after = draw.integers(2, size=400), draw.integers(2, size=400)
    result = drop(METRICS["accuracy"], labels(before, golds), labels(after, golds))
    width = 2 * 1.96 * np.std(before - after) / np.sqrt(400)
    assert result.ci_high - result.ci_low == pytest.approx(width, rel=0.1)  # percentiles of 1,000 draws


def test_equal_answers_have_no_drop() -> None:
    before, after = (labels([0, 1, 1], [1, 1, 0]) for _ in range(2))
    assert drop(METRICS["accuracy"], before, after) == Drop(value=0.0, ci_low=0.0, ci_high=0.0, p_value=1.0)


def test_questions_are_swapped_as_units() -> None:
    """Six questions of four rows, each lost by two of them: six coins, where a coin a row would mix the two."""
    golds, questions = [1, 0, 1, 0] * 6, [number // 4 for number in range(24)]
    after = [0, 1, 1, 0] * 6
    metric = METRICS["question_match"]
    result = drop(metric, labels(golds, golds, questions), labels(after, golds, questions))
    assert (result.value, result.ci_low, result.ci_high) == (1, 1, 1)
    assert result.p_value == pytest.approx(1 / 64, abs=0.013)


def test_drop_of_texts() -> None:
    metric, golds = METRICS["exact_match"], [("a", "b")] * 8
    result = drop(metric, labels(["a"] * 8, golds), labels(["c"] * 7 + [None], golds))
    assert result.value == 1
    assert result.significant
    with pytest.raises(ValueError, match="8 rows and 1; compare answers to the same rows"):
        drop(metric, labels(["a"] * 8, golds), labels(["a"], golds[:1]))


def test_single_row_has_two_orders() -> None:
    golds = [1]
    lost = drop(METRICS["accuracy"], labels([1], golds), labels([0], golds))
    assert (lost.value, lost.p_value) == (1.0, 0.5)
    gained = drop(METRICS["accuracy"], labels([0], golds), labels([1], golds))
    assert (gained.value, gained.p_value) == (-1.0, 1.0)
