"""Groups of runs as a table: a row says what is trained, a column the task, and labels say what differs."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, final

from softprompt.analysis.report.groups import WAYS, Group, Settings
from softprompt.analysis.report.read import printable
from softprompt.prompts import PromptConfig

_SHARED = {field.name for field in dataclasses.fields(PromptConfig)}
"""Settings that every method has: compared among all rows, as the training's are. Others are compared in a method."""


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """What is trained: a method with settings."""

    label: str
    method: str
    settings: Settings


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows x columns with a group in each cell that has runs."""

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Group]
    """By the labels of row and column."""
    common: Settings
    """What all rows have alike."""
    differing: Mapping[str, Sequence[str]]
    """By method: the settings that its rows' labels tell."""
    chosen: Mapping[tuple[str, str], str]
    """In a grid of the best settings: which they are, a cell."""

    def of_row(self, row: Row) -> list[Group]:
        """Its cells."""
        return [self.cells[row.label, column] for column in self.columns if (row.label, column) in self.cells]

    def of_column(self, column: str) -> list[tuple[Row, Group]]:
        """Its cells with their rows."""
        return [(row, self.cells[row.label, column]) for row in self.rows if (row.label, column) in self.cells]

    @property
    def groups(self) -> list[Group]:
        """All cells, row by row."""
        return [group for row in self.rows for group in self.of_row(row)]


def arrange(groups: Sequence[Group], *, choose: bool = False) -> Grid:
    """The groups as rows and columns, with labels that say what differs.

    Args:
        choose: of groups that differ in the training's or the method's settings alone, keep for each task the one with
            the best mean development score; CONDITIONS such as backbone and shots are never chosen among.
    """
    if choose:
        return _grid(_best(groups), lambda group: {name: group.settings[name] for name in CONDITIONS}, groups)
    return _grid(groups, lambda group: group.settings, ())


CONDITIONS = ("backbone", "weights", "dtype", "shots", "shots_balanced", *WAYS)
"""Settings under which methods are compared: never chosen among."""


def _best(groups: Sequence[Group]) -> list[Group]:
    best: dict[str, Group] = {}
    for group in groups:
        key = _contest(group)
        if key not in best or _merit(group) > _merit(best[key]):
            best[key] = group
    return list(best.values())


def _contest(group: Group) -> str:
    """What groups have alike that are chosen among."""
    return json.dumps([group.method, group.column, [group.settings[name] for name in CONDITIONS]], sort_keys=True)


def _merit(group: Group) -> tuple[float, float]:
    """The development score; among equals the smaller prompt."""
    return group.spread("dev").mean, -group.spread("trainable").mean


def _grid(groups: Sequence[Group], settings: Callable[[Group], Settings], among: Sequence[Group]) -> Grid:
    rows = _distinct((group.method, settings(group)) for group in groups)
    columns = _distinct(("", group.column) for group in groups)
    differing = {method: _told(rows, method) for method, _ in rows}
    row_labels = _unique([label(method, known, differing[method]) for method, known in rows])
    column_labels = _column_labels([column for _, column in columns])
    order = sorted(range(len(rows)), key=lambda place: _order(rows[place]))
    cells, chosen = {}, {}
    for one in groups:
        place = row_labels[rows.index((one.method, settings(one)))], column_labels[columns.index(("", one.column))]
        cells[place] = one
        if among:
            chosen[place] = _choice(one, among)
    return Grid(
        rows=tuple(Row(label=row_labels[place], method=rows[place][0], settings=rows[place][1]) for place in order),
        columns=tuple(sorted(column_labels)),
        cells=cells,
        common=_common(rows),
        differing=differing,
        chosen=chosen,
    )


def _choice(best: Group, among: Sequence[Group]) -> str:
    """Its settings that differ anywhere in its method, and among how many it was chosen."""
    tried = _distinct((other.method, other.settings) for other in among if other.method == best.method)
    names = [name for name in _differing(tried) if name not in CONDITIONS]
    count = sum(_contest(other) == _contest(best) for other in among)
    return f"{_said(best.settings, names)}{f', 1 of {count}' if count > 1 else ''}"


def _common(rows: Sequence[tuple[str, Settings]]) -> Settings:
    alike = (name for name in rows[0][1] if all(name in known for _, known in rows) and len(_values(rows, name)) == 1)
    return {name: rows[0][1][name] for name in alike}


def _distinct(pairs: Iterable[tuple[str, Settings]]) -> list[tuple[str, Settings]]:
    return list({json.dumps(pair, sort_keys=True): pair for pair in pairs}.values())


def _values(rows: Sequence[tuple[str, Settings]], name: str) -> set[str]:
    return {json.dumps(settings[name], sort_keys=True) for _, settings in rows if name in settings}


def _differing(rows: Sequence[tuple[str, Settings]]) -> list[str]:
    names = dict.fromkeys(name for _, settings in rows for name in settings)
    # The weights' hash says more than the name only where one name stands for several weights.
    plain = len(_values(rows, "backbone")) == len(_values(rows, "weights"))
    return [name for name in names if len(_values(rows, name)) > 1 and not (plain and name == "weights")]


def _told(rows: Sequence[tuple[str, Settings]], method: str) -> list[str]:
    """What differs: of a method's own settings among its rows, of the others among all rows."""
    shared = set.intersection(*(set(settings) for _, settings in rows)) | _SHARED
    own = _differing([row for row in rows if row[0] == method])
    return [*own, *(name for name in _differing(rows) if name in shared and name not in own)]


def label(method: str, settings: Settings, names: Sequence[str]) -> str:
    """The method and those of its settings."""
    return f"{printable(method)} {_said(settings, names)}".strip()


def _unique(labels: Sequence[str]) -> list[str]:
    """Equal labels numbered, so that none hides another: long numbers and paths are shown shortened."""
    seen: Counter[str] = Counter()
    made = []
    for label in labels:
        seen[label] += 1
        made.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return made


def _said(settings: Settings, names: Sequence[str]) -> str:
    return " ".join(f"{name}={_value(name, settings[name])}" for name in names if name in settings)


def _value(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = printable(str(value))
    return PurePath(text).name or text if name == "backbone" else text


def _column_labels(columns: Sequence[Settings]) -> list[str]:
    labels = [str(column["task"]) for column in columns]
    for name in ("protocol", "metric", "data", "wording"):
        twice = {label for label, count in Counter(labels).items() if count > 1}
        for label in twice:
            places = [place for place, other in enumerate(labels) if other == label]
            values = [columns[place][name] for place in places]
            kinds = list(dict.fromkeys(values))
            if len(kinds) > 1:
                for place, value in zip(places, values, strict=True):
                    # A wording is long: it is numbered, and told in full in the JSON.
                    shown = kinds.index(value) + 1 if name == "wording" else printable(str(value))
                    labels[place] = f"{label} {name}={shown}"
    return _unique(labels)


def _order(row: tuple[str, Settings]) -> tuple[Any, ...]:
    """By method, then by settings as numbers where they are: rank 5 before rank 10."""
    method, settings = row
    return method, [
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value)) for value in settings.values()
    ]
