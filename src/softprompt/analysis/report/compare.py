"""Differences between rows of a table, paired by seed: equal seeds have equal splits and few-shot draws."""

from dataclasses import dataclass
from typing import final

from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Group, Interval, Spread

NO_SPREAD = "no spread"
"""The verdict where every seed differs by as much."""


@final
@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row's test score minus the reference row's, on one task; fractions."""

    row: str
    column: str
    spread: Spread
    """A difference for each seed that both have."""
    seeds: tuple[int, ...]

    @property
    def interval(self) -> Interval | None:
        """Student's t interval of the mean difference; none of a single seed, or where all seeds differ by as much."""
        return self.spread.interval

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `no difference shown`, `one seed`, or `no spread` to measure the difference by."""
        if self.interval is None:
            return "one seed" if len(self.seeds) == 1 else NO_SPREAD
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "no difference shown"


def differences(grid: Grid, reference: str) -> list[Difference]:
    """Every other row against `reference`, where both have a seed in common.

    Args:
        reference: a row's label, or the method of a single row.

    Raises:
        ValueError: no row, or several, of that name.
    """
    against = _reference(grid, reference)
    found = []
    for column in grid.columns:
        base = grid.cells.get((against, column))
        for row in grid.rows:
            other = grid.cells.get((row.label, column))
            if base is None or other is None or row.label == against:
                continue
            if seeds := tuple(sorted(set(base.seeds) & set(other.seeds))):
                ours, theirs = _by_seed(other), _by_seed(base)
                spread = Spread(tuple(ours[seed] - theirs[seed] for seed in seeds))
                found.append(Difference(row=row.label, column=column, spread=spread, seeds=seeds))
    return found


def _by_seed(group: Group) -> dict[int, float]:
    return {result.seed: float(result.numbers["test"]) for result in group.results}


def _reference(grid: Grid, name: str) -> str:
    labels = [row.label for row in grid.rows]
    if name in labels:
        return name
    rows = [row.label for row in grid.rows if row.method == name]
    if len(rows) == 1:
        return rows[0]
    if rows:
        raise ValueError(f"compare is {name!r}, which {len(rows)} rows are; give one of {', '.join(map(repr, rows))}")
    raise ValueError(f"compare is {name!r}, which is no row; give one of {', '.join(map(repr, labels))}")
