"""What the tables say: scores in percent with one decimal, each beside n, the majority answer and an interval."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import final

from softprompt.analysis.report.compare import NO_SPREAD, Difference
from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Group, Interval
from softprompt.analysis.report.read import printable

MARKS = {"within": "†", "below": "‡", "above": ""}
"""What a score's standing against the majority answer puts behind it."""
SELECTION_MARK = "§"
Shown = Callable[[float], str]
_MINUS = "−"


@final
@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in rows and columns, for any format; a text may have several lines."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int
    """How many columns at the left are words; the others are numbers."""
    references: int = 0
    """How many rows at the top are not results but what to compare them with."""
    notes: tuple[str, ...] = ()


def scores(grid: Grid) -> Table:
    """Methods x tasks."""
    head = ["method", *(f"{name}\n{_metric(grid, name)}" for name in grid.columns), "numbers", "bytes", "seconds"]
    rows = [
        ["majority answer", *(_majority(grid, name) for name in grid.columns), "", "", ""],
        ["test rows", *(_rows(grid, name) for name in grid.columns), "", "", ""],
    ]
    for row in grid.rows:
        places = [(row.label, name) for name in grid.columns]
        shown = (_score(grid.cells.get(place), grid.chosen.get(place, "")) for place in places)
        rows.append([row.label, *shown, *_costs(grid.of_row(row))])
    return Table(
        title="Test scores",
        head=tuple(head),
        rows=tuple(map(tuple, rows)),
        words=1,
        references=2,
        notes=tuple(_notes(grid)),
    )


def details(grid: Grid) -> Table:
    """A line a cell, with both intervals."""
    head = ["task", "method", "test", "sd", "seeds", "95% test rows", "95% seeds", "majority", "n", "dev", "best step"]
    zero_shot = any(group.zero_shot is not None for group in grid.groups)
    if zero_shot:
        head.insert(8, "zero_shot")
    rows = []
    for name in grid.columns:
        for row, group in grid.of_column(name):
            line = [name, f"{row.label} {_brackets(grid.chosen.get((row.label, name), ''))}".strip(), *_numbers(group)]
            if zero_shot:
                line.insert(8, "" if group.zero_shot is None else percent(group.zero_shot))
            rows.append(tuple(line))
    extra = sorted({name for group in grid.groups for result in group.results for name in result.extra_metrics})
    notes = [f"Further metrics ({', '.join(extra)}) are in results.json."] if extra else []
    return Table(title="Every score", head=tuple(head), rows=tuple(rows), words=2, notes=tuple(notes))


def comparison(found: Sequence[Difference], reference: str) -> Table:
    """Differences to the reference row, paired by seed."""
    rows = [
        (
            one.column,
            one.row,
            signed(one.spread.mean),
            interval(one.interval, signed),
            ", ".join(map(str, one.seeds)),
            one.verdict,
        )
        for one in found
    ]
    notes: tuple[str, ...] = (
        "Test score minus the reference's, in percent points, paired by seed (equal seeds have equal rows).",
        "The interval is Student's t over the seeds; several comparisons are made, and it is not widened for that.",
    )
    if any(one.verdict == NO_SPREAD for one in found):
        notes += (f"{NO_SPREAD}: every seed differs by as much, so no interval can be drawn.",)
    head = ("task", "method", "difference", "95% seeds", "seeds", f"against {reference}")
    return Table(title=f"Against {reference}", head=head, rows=tuple(rows), words=2, notes=notes)


def percent(value: float) -> str:
    """A fraction as percent with one decimal."""
    return f"{100 * value:.1f}".replace("-", _MINUS)


def signed(value: float) -> str:
    """A difference, in percent points."""
    return f"{100 * value:+.1f}".replace("-", _MINUS)


def interval(given: Interval | None, shown: Shown = percent) -> str:
    """`[low, high]`; a dash where there is none."""
    return "–" if given is None else f"[{shown(given.low)}, {shown(given.high)}]"


def bytes_text(count: float) -> str:
    """Decimal units, as files are sold.

    >>> bytes_text(24_040.0)
    '24 kB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _numbers(group: Group) -> list[str]:
    test = group.spread("test")
    return [
        percent(test.mean) + _marks(group),
        "–" if test.deviation is None else percent(test.deviation),
        str(len(group.seeds)),
        interval(group.rows_interval),
        interval(test.interval),
        percent(group.spread("majority").mean),
        _between(group.spread("n_test").values),
        percent(group.spread("dev").mean),
        _between(group.spread("best_step").values),
    ]


def _score(group: Group | None, chosen: str) -> str:
    if group is None:
        return "–"
    test = group.spread("test")
    spread = f" ± {percent(test.deviation)}" if test.deviation is not None else ""
    seeds = f" ({len(group.seeds)})"
    lines = [percent(test.mean) + spread + seeds + _marks(group), interval(group.rows_interval)]
    return "\n".join([*lines, chosen] if chosen else lines)


def _marks(group: Group) -> str:
    return MARKS[group.standing] + (SELECTION_MARK if group.selection_warning else "")


def _costs(groups: Sequence[Group]) -> list[str]:
    def all_of(name: str) -> list[float]:
        return [value for group in groups for value in group.spread(name).values]

    sizes = [float(result.size) for group in groups for result in group.results]
    seconds = all_of("seconds")
    return [_between(all_of("trainable")), _between(sizes, bytes_text), f"{sum(seconds) / len(seconds):,.0f}"]


def _between(values: Iterable[float], shown: Shown = "{:,.0f}".format) -> str:
    known = sorted(values)
    low, high = shown(known[0]), shown(known[-1])
    return low if low == high else f"{low}–{high}"


def _metric(grid: Grid, column: str) -> str:
    return grid.of_column(column)[0][1].metric


def _majority(grid: Grid, column: str) -> str:
    return _between((group.spread("majority").mean for _, group in grid.of_column(column)), percent)


def _rows(grid: Grid, column: str) -> str:
    return _between([value for _, group in grid.of_column(column) for value in group.spread("n_test").values])


def _brackets(text: str) -> str:
    return f"({text})" if text else ""


def _notes(grid: Grid) -> Iterable[str]:
    yield (
        "Scores are percent: the mean over seeds ± the standard deviation (number of seeds); below it in brackets the "
        "95% interval over test rows, of a single run (its ends are means over the seeds). Seconds are a run's."
    )
    groups = grid.groups
    if any(group.standing == "within" for group in groups):
        yield (
            f"{MARKS['within']} Not shown to differ from the majority answer: its score lies within the 95% interval "
            "over test rows or over seeds."
        )
    if any(group.standing == "below" for group in groups):
        yield f"{MARKS['below']} Worse than the majority answer, beyond both intervals."
    for warning in dict.fromkeys(group.selection_warning for group in groups if group.selection_warning):
        yield f"{SELECTION_MARK} {warning.capitalize()}: compare with such scores alone."
    for group in groups:
        for result in group.results:
            if result.warning:
                yield f"Look at {result.name} before trusting its score: {result.warning}."
    uneven = [name for name in grid.columns if len({group.seeds for _, group in grid.of_column(name)}) > 1]
    if uneven:
        yield f"Not all rows have the same seeds in: {', '.join(uneven)}."
    if grid.chosen:
        yield (
            "Of each method the settings with the best mean development score are shown, chosen for each task; "
            '"1 of 9" says among how many.'
        )
    yield from _versions(groups)


def _versions(groups: Sequence[Group]) -> Iterable[str]:
    known: dict[str, set[str]] = {}
    for group in groups:
        for result in group.results:
            versions = result.run.record.get("versions")
            for package, version in versions.items() if isinstance(versions, dict) else ():
                known.setdefault(printable(str(package)), set()).add(printable(str(version)))
    for package, versions in sorted(known.items()):
        if len(versions) > 1:
            yield f"The runs were made with several versions of {package}: {', '.join(sorted(versions))}."
