"""The report as one HTML page that needs no network."""

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from softprompt import __version__
from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Group
from softprompt.analysis.report.plot_style import Plot, styles
from softprompt.analysis.report.read import SkippedRun, printable
from softprompt.analysis.report.tables import Table, percent

_FIRST = ("backbone", "dtype", "shots", "steps", "batch_size", "lr", "length")
"""Settings that are listed first."""


def page(
    title: str,
    grid: Grid,
    tables: Sequence[Table],
    further_tables: Sequence[Table],
    plots: Sequence[tuple[str, Sequence[Plot]]],
    skipped: Sequence[SkippedRun],
) -> str:
    """The page's HTML.

    Args:
        tables: the scores, and every score in detail.
        further_tables: what stands between them, such as differences from a reference.
        plots: by heading.
    """
    # Every text is escaped, since names of runs and error messages are not trusted.
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
        rows=_rows(grid, scores),
        further_tables=further_tables,
        plots=[(heading, section) for heading, section in plots if section],
        details=details,
        runs=_runs_table(grid),
        skipped=skipped,
        settings=[
            {"label": row.label, "settings": [(name, _plain(value)) for name, value in row.settings.items()]}
            for row in grid.rows
        ],
        version=__version__,
    )


def _lead(grid: Grid) -> str:
    results = [result for group in grid.groups for result in group.results]
    days = sorted(printable(str(result.run.record.get("created", "")))[:10] for result in results)
    dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
    methods, seeds = {row.method for row in grid.rows}, {result.seed for result in results}
    counts = [(len(results), "run"), (len(methods), "method"), (len(grid.columns), "task"), (len(seeds), "seed")]
    texts = [f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts]
    return f"{texts[0]} of {texts[1]} on {texts[2]}, {texts[3]}; trained {dates}."


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else printable(str(value))


def _rows(grid: Grid, scores: Table) -> list[dict[str, Any]]:
    by_method = styles(row.method for row in grid.rows)
    rows = []
    for row, texts in zip(grid.rows, scores.rows[scores.reference_rows :], strict=True):
        groups = [grid.cells.get((row.label, column)) for column in grid.columns]
        cells: list[dict[str, Any]] = []
        for column, group, text in zip(grid.columns, groups, texts[1:-3], strict=True):
            sort = "" if group is None else group.spread("test").mean
            cells.append({"lines": text.split("\n"), "sort": sort, "bar": group and _bar(grid, column, group)})
        for text, cost in zip(texts[-3:], _costs(grid.of_row(row)), strict=True):
            cells.append({"lines": [text], "sort": cost, "bar": None})
        rows.append({"label": row.label, "color": by_method[row.method].color, "cells": cells})
    return rows


def _costs(groups: Sequence[Group]) -> list[float]:
    """Parameters, bytes and seconds, to sort by."""
    sizes = [float(result.size) for group in groups for result in group.results]
    seconds = [value for group in groups for value in group.spread("seconds").values]
    return [max(max(group.spread("trainable").values) for group in groups), max(sizes), sum(seconds) / len(seconds)]


def _bar(grid: Grid, column: str, group: Group) -> dict[str, str]:
    """Positions in the small bar of a score, in percent of its width; a column has one scale."""
    all_values = [value for _, other in grid.of_column(column) for value in _bar_values(other)]
    low, high = min(all_values), max(all_values)
    unit = 100 / (high - low or 1)
    percents = [(value - low) * unit for value in _bar_values(group)]
    positions = dict(zip(("low", "high", "mean", "majority"), percents, strict=True))
    positions["width"] = positions.pop("high") - positions["low"]
    return {name: f"{position:.1f}" for name, position in positions.items()}


def _bar_values(group: Group) -> tuple[float, float, float, float]:
    interval = group.rows_interval
    return interval.low, interval.high, group.spread("test").mean, group.spread("majority").mean


def _runs_table(grid: Grid) -> Table:
    rows = []
    for column in grid.columns:
        for row, group in grid.of_column(column):
            for result in group.results:
                scores = [percent(float(result.values[name])) for name in ("test", "dev", "majority")]
                counts = [f"{result.values[name]:,.0f}" for name in ("steps", "best_step", "seconds")]
                rows.append((result.name, row.label, column, str(result.seed), *scores, *counts))
    head = ("run", "method", "task", "seed", "test", "dev", "majority", "steps", "best step", "seconds")
    return Table(title="Runs", head=head, rows=tuple(rows), text_columns=3)
