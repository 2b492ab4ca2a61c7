"""One HTML page with all of a report, for a browser without a network."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from softprompt import __version__
from softprompt.analysis.report.drawing import Picture
from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Group
from softprompt.analysis.report.palette import styles
from softprompt.analysis.report.read import SkippedRun, printable
from softprompt.analysis.report.tables import Table, percent

_FIRST = ("backbone", "dtype", "shots", "steps", "batch", "lr", "length")
"""Settings that a reader looks for first."""


def page(
    title: str,
    grid: Grid,
    tables: Sequence[Table],
    comparison: Table | None,
    pictures: Sequence[tuple[str, Sequence[Picture]]],
    left_out: Sequence[SkippedRun],
) -> str:
    """The page's whole text.

    Args:
        tables: the scores, and every score in detail.
        pictures: by heading.
    """
    # Escapes every text: names of runs and the words of errors were written by anybody.
    environment = Environment(
        loader=PackageLoader("softprompt.analysis.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    scores, details = tables
    return environment.get_template("page.html.j2").render(
        title=printable(title),
        lead=_lead(grid),
        common=[(name, _plain(grid.common[name])) for name in _FIRST if name in grid.common],
        further=[(name, _plain(value)) for name, value in grid.common.items() if name not in _FIRST],
        scores=scores,
        lines=_lines(grid, scores),
        comparison=comparison,
        pictures=[(heading, some) for heading, some in pictures if some],
        details=details,
        runs=_runs(grid),
        left_out=left_out,
        settings=[
            {"label": row.label, "told": [(name, _plain(value)) for name, value in row.settings.items()]}
            for row in grid.rows
        ],
        version=__version__,
    )


def _lead(grid: Grid) -> str:
    results = [result for group in grid.groups for result in group.results]
    days = sorted(printable(str(result.run.record.get("created", "")))[:10] for result in results)
    made = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    methods, seeds = {row.method for row in grid.rows}, {result.seed for result in results}
    counts = [(len(results), "run"), (len(methods), "method"), (len(grid.columns), "task"), (len(seeds), "seed")]
    said = [f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts]
    return f"{said[0]} of {said[1]} on {said[2]}, {said[3]}; trained {made}."


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else printable(str(value))


def _lines(grid: Grid, scores: Table) -> list[dict[str, Any]]:
    looks = styles(row.method for row in grid.rows)
    lines = []
    for row, texts in zip(grid.rows, scores.rows[scores.references :], strict=True):
        groups = [grid.cells.get((row.label, column)) for column in grid.columns]
        cells: list[dict[str, Any]] = []
        for column, group, text in zip(grid.columns, groups, texts[1:-3], strict=True):
            sort = "" if group is None else group.spread("test").mean
            cells.append({"lines": text.split("\n"), "sort": sort, "bar": group and _bar(grid, column, group)})
        for text, cost in zip(texts[-3:], _costs(grid.of_row(row)), strict=True):
            cells.append({"lines": [text], "sort": cost, "bar": None})
        lines.append({"label": row.label, "colour": looks[row.method].colour, "cells": cells})
    return lines


def _costs(groups: Sequence[Group]) -> list[float]:
    """Numbers, bytes and seconds, to sort by."""
    sizes = [float(result.size) for group in groups for result in group.results]
    seconds = [value for group in groups for value in group.spread("seconds").values]
    return [max(max(group.spread("trainable").values) for group in groups), max(sizes), sum(seconds) / len(seconds)]


def _bar(grid: Grid, column: str, group: Group) -> dict[str, str]:
    """Where the small drawing of a score has its parts, in percent of its width; a column has one scale."""
    everything = [value for _, other in grid.of_column(column) for value in _marks(other)]
    low, high = min(everything), max(everything)
    unit = 100 / (high - low or 1)
    places = [(value - low) * unit for value in _marks(group)]
    named = dict(zip(("low", "high", "mean", "majority"), places, strict=True))
    named["width"] = named.pop("high") - named["low"]
    return {name: f"{place:.1f}" for name, place in named.items()}


def _marks(group: Group) -> tuple[float, float, float, float]:
    interval = group.rows_interval
    return interval.low, interval.high, group.spread("test").mean, group.spread("majority").mean


def _runs(grid: Grid) -> Table:
    rows = []
    for column in grid.columns:
        for row, group in grid.of_column(column):
            for one in group.results:
                scores = [percent(float(one.numbers[name])) for name in ("test", "dev", "majority")]
                counts = [f"{one.numbers[name]:,.0f}" for name in ("steps", "best_step", "seconds")]
                rows.append((one.name, row.label, column, str(one.seed), *scores, *counts))
    head = ("run", "method", "task", "seed", "test", "dev", "majority", "steps", "best step", "seconds")
    return Table(title="Runs", head=head, rows=tuple(rows), words=3)
