"""The report's tables: scores in percent with one decimal, beside n, the majority answer and an interval."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

from softprompt.analysis.report.compare import NO_SPREAD, Difference
from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Group
from softprompt.analysis.report.read import printable
from softprompt.analysis.report.statistics import Interval

MARKS = {"within": "†", "below": "‡", "above": ""}
"""The mark after a score, by its position against the majority answer."""
SELECTION_MARK = "§"
Formatter = Callable[[float], str]
_MINUS = "−"


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in rows and columns, for any format; a text may have several lines."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int
    """The number of columns at the left that hold text; the others hold numbers."""
    reference_rows: int = 0
    """The number of rows at the top that are not results but references, such as the majority answer."""
    notes: tuple[str, ...] = ()


def scores(grid: Grid) -> Table:
    """Methods by tasks."""
    head = ["method", *(f"{name}\n{_metric(grid, name)}" for name in grid.columns), "parameters", "bytes", "seconds"]
    rows = [
        ["majority answer", *(_majority(grid, name) for name in grid.columns), "", "", ""],
        ["test rows", *(_test_rows(grid, name) for name in grid.columns), "", "", ""],
    ]
    for row in grid.rows:
        keys = [(row.label, name) for name in grid.columns]
        cells = (_score(grid.cells.get(key), grid.best_settings.get(key, "")) for key in keys)
        rows.append([row.label, *cells, *_costs(grid.of_row(row))])
    return Table(
        title="Test scores",
        head=tuple(head),
        rows=tuple(map(tuple, rows)),
        text_columns=1,
        reference_rows=2,
        notes=tuple(_notes(grid)),
    )


def details(grid: Grid) -> Table:
    """A line per cell, with both intervals."""
    head = ["task", "method", "test", "sd", "seeds", "95% test rows", "95% seeds", "majority", "n", "dev", "best step"]
    zero_shot = any(group.zero_shot is not None for group in grid.groups)
    if zero_shot:
        head.insert(8, "zero_shot")
    rows = []
    for name in grid.columns:
        for row, group in grid.of_column(name):
            best = grid.best_settings.get((row.label, name), "")
            line = [name, f"{row.label} ({best})" if best else row.label, *_detail_cells(group)]
            if zero_shot:
                line.insert(8, "" if group.zero_shot is None else percent(group.zero_shot))
            rows.append(tuple(line))
    extra = sorted({name for group in grid.groups for result in group.results for name in result.extra_metrics})
    notes = [f"Further metrics ({', '.join(extra)}) are in results.json."] if extra else []
    return Table(title="Every score", head=tuple(head), rows=tuple(rows), text_columns=2, notes=tuple(notes))


def comparison(differences: Sequence[Difference], reference: str) -> Table:
    """Differences from the reference row, paired by seed."""
    rows = [
        (
            difference.column,
            difference.row,
            "" if difference.mean is None else signed(difference.mean),
            interval_text(difference.interval, signed),
            ", ".join(map(str, difference.seeds)),
            difference.verdict,
        )
        for difference in differences
    ]
    notes: tuple[str, ...] = (
        "Test score minus the reference's, in points, paired by seed where both were scored on the same rows.",
        "The interval is Student's t over the seeds, without correction for the number of comparisons.",
    )
    if left_out := [difference for difference in differences if difference.other_rows]:
        names = ", ".join(dict.fromkeys(f"{difference.row} on {difference.column}" for difference in left_out))
        notes += (f"Left out, since they were scored on other test rows than the reference: seeds of {names}.",)
    if any(difference.verdict == NO_SPREAD for difference in differences):
        notes += (f"{NO_SPREAD}: the difference is the same for every seed, so there is no interval.",)
    head = ("task", "method", "difference", "95% seeds", "seeds", f"against {reference}")
    return Table(title=f"Against {reference}", head=head, rows=tuple(rows), text_columns=2, notes=notes)


_DISTILLED = {
    "teacher": "the whole context (teacher)",
    "prompt": "the distilled prompt",
    "context_start": "the context's first tokens",
    "context_end": "the context's last tokens",
    "no_context": "no context",
}
"""What is in front of a row, by its name in a run's results, in the order of the table."""


def distillation(grid: Grid) -> Table | None:
    """Distilled prompts beside their teacher and cheaper ways to have the context; None if no run is a distillation."""
    rows = []
    for column in grid.columns:
        for row, group in grid.of_column(column):
            for name, text in _DISTILLED.items():
                models = [result.distillation[name] for result in group.results if name in result.distillation]
                if not models:
                    continue
                tokens, kl, agreement, score = (
                    [model[key] for model in models] for key in ("tokens", "kl", "agreement", "score")
                )
                shares = [percent(statistics.fmean(values)) for values in (agreement, score)]
                line = (_range(tokens), f"{statistics.fmean(kl):.3f}", *shares, str(len(models)))
                rows.append((column, row.label, text, *line))
    if not rows:
        return None
    return Table(
        title="Distillation",
        head=("task", "method", "in front of a row", "tokens", "KL", "same answer", "score", "seeds"),
        rows=tuple(rows),
        text_columns=3,
        notes=(
            "KL is the mean divergence from the teacher on the test rows, in nats per row of a classification or per "
            "answer token; same answer is the share of rows with exactly the teacher's. Means over seeds.",
        ),
    )


def percent(value: float) -> str:
    """A fraction as percent with one decimal."""
    return f"{100 * value:.1f}".replace("-", _MINUS)


def signed(value: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", _MINUS)


def interval_text(interval: Interval | None, text: Formatter = percent) -> str:
    """`[low, high]`; a dash for none."""
    return "–" if interval is None else f"[{text(interval.low)}, {text(interval.high)}]"


def bytes_text(count: float) -> str:
    """A size in decimal units.

    >>> bytes_text(24_040.0)
    '24 kB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _detail_cells(group: Group) -> list[str]:
    test = group.spread("test")
    return [
        percent(test.mean) + _marks(group),
        "–" if test.deviation is None else percent(test.deviation),
        str(len(group.seeds)),
        interval_text(group.rows_interval),
        interval_text(test.interval),
        percent(group.spread("majority").mean),
        _range(group.spread("n_test").values),
        percent(group.spread("dev").mean),
        _range(group.spread("best_step").values),
    ]


def _score(group: Group | None, best_settings: str) -> str:
    if group is None:
        return "–"
    test = group.spread("test")
    deviation = f" ± {percent(test.deviation)}" if test.deviation is not None else ""
    seeds = f" ({len(group.seeds)})"
    lines = [percent(test.mean) + deviation + seeds + _marks(group), interval_text(group.rows_interval)]
    return "\n".join([*lines, best_settings] if best_settings else lines)


def _marks(group: Group) -> str:
    return MARKS[group.against_majority] + (SELECTION_MARK if group.selection_warning else "")


def _costs(groups: Sequence[Group]) -> list[str]:
    def values(name: str) -> list[float]:
        return [value for group in groups for value in group.spread(name).values]

    sizes = [float(result.size) for group in groups for result in group.results]
    seconds = values("seconds")
    return [_range(values("trainable")), _range(sizes, bytes_text), f"{sum(seconds) / len(seconds):,.0f}"]


def _range(values: Iterable[float], text: Formatter = "{:,.0f}".format) -> str:
    ordered = sorted(values)
    low, high = text(ordered[0]), text(ordered[-1])
    return low if low == high else f"{low}–{high}"


def _metric(grid: Grid, column: str) -> str:
    return grid.of_column(column)[0][1].metric


def _majority(grid: Grid, column: str) -> str:
    return _range((group.spread("majority").mean for _, group in grid.of_column(column)), percent)


def _test_rows(grid: Grid, column: str) -> str:
    return _range([value for _, group in grid.of_column(column) for value in group.spread("n_test").values])


def _notes(grid: Grid) -> Iterable[str]:
    yield (
        "Scores are percent: the mean over seeds ± the standard deviation (number of seeds); below it in brackets the "
        "95% interval over test rows of a single run (its ends averaged over seeds). Seconds are per run."
    )
    groups = grid.groups
    if any(group.against_majority == "within" for group in groups):
        yield (
            f"{MARKS['within']} Not shown to differ from the majority answer, whose score lies within the 95% interval "
            "over test rows or over seeds."
        )
    if any(group.against_majority == "below" for group in groups):
        yield f"{MARKS['below']} Worse than the majority answer, beyond both intervals."
    for warning in dict.fromkeys(group.selection_warning for group in groups if group.selection_warning):
        yield f"{SELECTION_MARK} {warning.capitalize()}: compare only with other such scores."
    for group in groups:
        for result in group.results:
            if result.warning:
                yield f"Check {result.name} before trusting its score: {result.warning}."
    uneven = [name for name in grid.columns if len({group.seeds for _, group in grid.of_column(name)}) > 1]
    if uneven:
        yield f"Not all rows have the same seeds in: {', '.join(uneven)}."
    if grid.best_settings:
        yield (
            "Of each method only the settings with the best mean development score are shown, selected for each task; "
            '"1 of 9" is the number of candidates. One with fewer seeds than another is never chosen.'
        )
    yield from _versions(groups)


def _versions(groups: Sequence[Group]) -> Iterable[str]:
    by_package: dict[str, set[str]] = {}
    for group in groups:
        for result in group.results:
            versions = result.run.record.get("versions")
            for package, version in versions.items() if isinstance(versions, dict) else ():
                by_package.setdefault(printable(str(package)), set()).add(printable(str(version)))
    for package, package_versions in sorted(by_package.items()):
        if len(package_versions) > 1:
            yield f"The runs were made with several versions of {package}: {', '.join(sorted(package_versions))}."
