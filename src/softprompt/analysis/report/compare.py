"""Differences between rows of the table, paired by seed, where equal seeds were scored on the same test rows."""

from dataclasses import dataclass
from typing import final

from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.read import Result
from softprompt.analysis.report.statistics import Interval, Spread

NO_SPREAD = "no spread"
"""The verdict where the difference is the same for every seed."""
OTHER_ROWS = "other rows"
"""The verdict where no seed was scored on the reference's test rows."""


@final
@dataclass(frozen=True, kw_only=True)
class Difference:
    """A row's test score minus the reference row's on one task, as fractions."""

    row: str
    """The row's label."""
    column: str
    """The task's label."""
    spread: Spread
    """The difference for each seed that both rows have."""
    seeds: tuple[int, ...]
    other_rows: tuple[int, ...] = ()
    """Seeds that both rows have and that were scored on other test rows, so that they are left out."""

    @property
    def mean(self) -> float | None:
        """The mean difference; None where no seed was scored on the same rows."""
        return self.spread.mean if self.seeds else None

    @property
    def interval(self) -> Interval | None:
        """Student's t interval of the mean difference; None for a single seed or without a spread."""
        return self.spread.interval

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `no significant difference`, `one seed`, `no spread` or `other rows`."""
        if not self.seeds:
            return OTHER_ROWS
        if self.interval is None:
            return "one seed" if len(self.seeds) == 1 else NO_SPREAD
        if self.interval.low > 0:
            return "better"
        return "worse" if self.interval.high < 0 else "no significant difference"


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
            ours, theirs = ({result.seed: result for result in group.results} for group in (other, base))
            shared = sorted(ours.keys() & theirs.keys())
            seeds = tuple(seed for seed in shared if _test_rows(ours[seed]) == _test_rows(theirs[seed]))
            if shared:
                values = tuple(float(ours[seed].values["test"] - theirs[seed].values["test"]) for seed in seeds)
                left_out = tuple(seed for seed in shared if seed not in seeds)
                result.append(
                    Difference(row=row.label, column=column, spread=Spread(values), seeds=seeds, other_rows=left_out)
                )
    return result


def _test_rows(result: Result) -> tuple[str, float]:
    """What identifies a run's test rows: the fingerprint of the test split, and how many of its rows were scored."""
    return str(result.run.record["data"]["test"]), result.values["n_test"]


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
    raise ValueError(f"compare is {name!r}, which is not a row; give one of {', '.join(map(repr, labels))}")
