"""Differences between rows of the table, paired by seed: equal seeds have equal splits and few-shot samples."""

from dataclasses import dataclass
from typing import final

from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Group
from softprompt.analysis.report.statistics import Interval, Spread

NO_SPREAD = "no spread"
"""The verdict where the difference is the same for every seed."""


@final
@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row's test score minus the reference row's on one task, as fractions."""

    row: str
    column: str
    spread: Spread
    """The difference for each seed that both rows have."""
    seeds: tuple[int, ...]

    @property
    def interval(self) -> Interval | None:
        """Student's t interval of the mean difference; none for a single seed or without a spread."""
        return self.spread.interval

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `no difference shown`, `one seed` or `no spread`."""
        if self.interval is None:
            return "one seed" if len(self.seeds) == 1 else NO_SPREAD
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "no difference shown"


def differences(grid: Grid, reference: str) -> list[Difference]:
    """Every other row against `reference`, on the tasks where both have a seed in common.

    Args:
        reference: a row's label, or the method of a single row.

    Raises:
        ValueError: no row, or several, of that name.
    """
    reference_row = _reference_row(grid, reference)
    result = []
    for column in grid.columns:
        base = grid.cells.get((reference_row, column))
        for row in grid.rows:
            other = grid.cells.get((row.label, column))
            if base is None or other is None or row.label == reference_row:
                continue
            if seeds := tuple(sorted(set(base.seeds) & set(other.seeds))):
                scores, base_scores = _test_by_seed(other), _test_by_seed(base)
                spread = Spread(tuple(scores[seed] - base_scores[seed] for seed in seeds))
                result.append(Difference(row=row.label, column=column, spread=spread, seeds=seeds))
    return result


def _test_by_seed(group: Group) -> dict[int, float]:
    return {result.seed: float(result.values["test"]) for result in group.results}


def _reference_row(grid: Grid, name: str) -> str:
    labels = [row.label for row in grid.rows]
    if name in labels:
        return name
    rows = [row.label for row in grid.rows if row.method == name]
    if len(rows) == 1:
        return rows[0]
    if rows:
        raise ValueError(
            f"compare is {name!r}, a method with {len(rows)} rows; give one of {', '.join(map(repr, rows))}"
        )
    raise ValueError(f"compare is {name!r}, which is no row; give one of {', '.join(map(repr, labels))}")
