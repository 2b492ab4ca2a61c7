"""Arrange groups as a table: a row is a method with settings, a column a task, and labels name what differs."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, final

from softprompt.analysis.report.groups import CONTENTS, SETTING_FIELDS, Group, Settings
from softprompt.analysis.report.read import printable
from softprompt.prompts import PromptConfig

_COMMON_METHOD_SETTINGS = {field.name for field in dataclasses.fields(PromptConfig)}
"""Settings that every method has: compared among all rows, like the training's; others within a method."""


@final
@dataclass(frozen=True, kw_only=True)
class Row:
    """A method with settings."""

    label: str
    method: str
    settings: Settings


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows and columns, with a group in each cell that has runs."""

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Group]
    """By the labels of row and column."""
    common: Settings
    """Settings that are equal in all rows."""
    differing: Mapping[str, Sequence[str]]
    """By method: the settings that its rows' labels name."""
    best_settings: Mapping[tuple[str, str], str]
    """In a grid of the best settings: those of each cell, in words."""

    def of_row(self, row: Row) -> list[Group]:
        """The groups of one row."""
        return [self.cells[row.label, column] for column in self.columns if (row.label, column) in self.cells]

    def of_column(self, column: str) -> list[tuple[Row, Group]]:
        """The groups of one column with their rows."""
        return [(row, self.cells[row.label, column]) for row in self.rows if (row.label, column) in self.cells]

    @property
    def groups(self) -> list[Group]:
        """All groups, row by row."""
        return [group for row in self.rows for group in self.of_row(row)]


def arrange(groups: Sequence[Group], *, choose: bool = False) -> Grid:
    """Arrange groups in rows and columns, with labels that name what differs.

    Args:
        choose: of groups that differ only in settings of the training or the method, keep for each task the one that
            `best_by` names. Groups that differ in CONDITIONS, such as backbone or shots, are all kept.
    """
    if choose:
        return _grid(
            best_by(groups, _candidates_key), lambda group: {name: group.settings[name] for name in CONDITIONS}, groups
        )
    return _grid(groups, lambda group: group.settings, ())


CONDITIONS = ("backbone", "weights", "dtype", "shots", "shots_balanced", *SETTING_FIELDS, *CONTENTS)
"""Settings under which methods are compared, so `choose` never selects among them."""


_HASHED = {"weights": "backbone", "context_hash": "context", "init_prompt_hash": "init_prompt"}
"""Settings that are hashes of what another one names."""


def best_by(groups: Sequence[Group], key: Callable[[Group], Any]) -> list[Group]:
    """Of the groups with an equal key the one with the best mean development score; among equals the smaller prompt.

    Only those with the most seeds can be it: a setting whose other seeds diverged has no mean to compare.
    """

    def rank(group: Group) -> tuple[int, float, float]:
        return len(group.seeds), group.spread("dev").mean, -group.spread("trainable").mean

    by_key: dict[str, list[Group]] = {}
    for group in groups:
        by_key.setdefault(json.dumps(key(group), sort_keys=True), []).append(group)
    return [max(candidates, key=rank) for candidates in by_key.values()]


def _candidates_key(group: Group) -> list[Any]:
    """Equal for groups of which `choose` keeps one."""
    return [group.method, group.task_settings, [group.settings[name] for name in CONDITIONS]]


def _grid(groups: Sequence[Group], settings: Callable[[Group], Settings], candidates: Sequence[Group]) -> Grid:
    rows_by_key = {_key((group.method, settings(group))): (group.method, settings(group)) for group in groups}
    columns_by_key = {_key(group.task_settings): group.task_settings for group in groups}
    rows = list(rows_by_key.values())
    differing = {method: _label_settings(rows, method) for method, _ in rows}
    row_labels = _unique([label(method, row_settings, differing[method]) for method, row_settings in rows])
    column_labels = _column_labels(list(columns_by_key.values()))
    label_of_row = dict(zip(rows_by_key, row_labels, strict=True))
    label_of_column = dict(zip(columns_by_key, column_labels, strict=True))
    order = sorted(range(len(rows)), key=lambda index: _sort_key(rows[index]))
    cells, best_settings = {}, {}
    for group in groups:
        cell = label_of_row[_key((group.method, settings(group)))], label_of_column[_key(group.task_settings)]
        cells[cell] = group
        if candidates:
            best_settings[cell] = _describe_best(group, candidates)
    return Grid(
        rows=tuple(Row(label=row_labels[index], method=rows[index][0], settings=rows[index][1]) for index in order),
        columns=tuple(sorted(column_labels)),
        cells=cells,
        common=_common(rows),
        differing=differing,
        best_settings=best_settings,
    )


def _describe_best(best: Group, candidates: Sequence[Group]) -> str:
    """The settings that differ anywhere in its method, the number of candidates, and those with fewer seeds."""
    tried = _distinct((other.method, other.settings) for other in candidates if other.method == best.method)
    names = [name for name in _differing(tried) if name not in CONDITIONS]
    rivals = [other for other in candidates if _candidates_key(other) == _candidates_key(best)]
    fewer = sum(len(other.seeds) < len(best.seeds) for other in rivals)
    count = f", 1 of {len(rivals)}" if len(rivals) > 1 else ""
    return f"{_in_words(best.settings, names)}{count}{f' ({fewer} with fewer seeds)' if fewer else ''}"


def _common(rows: Sequence[tuple[str, Settings]]) -> Settings:
    first = rows[0][1]
    return {
        name: first[name]
        for name in first
        if all(name in settings for _, settings in rows) and len(_values(rows, name)) == 1
    }


def _distinct(pairs: Iterable[tuple[str, Settings]]) -> list[tuple[str, Settings]]:
    return list({_key(pair): pair for pair in pairs}.values())


def _key(value: Any) -> str:
    """Equal for equal settings, which cannot be dictionary keys themselves."""
    return json.dumps(value, sort_keys=True)


def _values(rows: Sequence[tuple[str, Settings]], name: str) -> set[str]:
    return {_key(settings[name]) for _, settings in rows if name in settings}


def _differing(rows: Sequence[tuple[str, Settings]]) -> list[str]:
    names = dict.fromkeys(name for _, settings in rows for name in settings)
    counts = {name: len(_values(rows, name)) for name in names}
    # A hash adds something only where one name has several contents.
    return [name for name in names if counts[name] > 1 and counts[name] != counts.get(_HASHED.get(name, ""))]


def _label_settings(rows: Sequence[tuple[str, Settings]], method: str) -> list[str]:
    """What differs: of a method's own settings among its rows, of the others among all rows."""
    shared = set.intersection(*(set(settings) for _, settings in rows)) | _COMMON_METHOD_SETTINGS
    own_names = _differing([row for row in rows if row[0] == method])
    return [*own_names, *(name for name in _differing(rows) if name in shared and name not in own_names)]


def label(method: str, settings: Settings, names: Sequence[str]) -> str:
    """The method and the named settings."""
    return f"{printable(method)} {_in_words(settings, names)}".strip()


def _unique(labels: Sequence[str]) -> list[str]:
    """Number equal labels, which occur because long numbers and paths are shortened."""
    counts: Counter[str] = Counter()
    unique = []
    for text in labels:
        counts[text] += 1
        unique.append(text if counts[text] == 1 else f"{text} ({counts[text]})")
    return unique


def _in_words(settings: Settings, names: Sequence[str]) -> str:
    return " ".join(f"{name}={_value(name, settings[name])}" for name in names if name in settings)


def _value(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = printable(str(value))
    return PurePath(text).name or text if name == "backbone" else text


def _column_labels(columns: Sequence[Settings]) -> list[str]:
    labels = [str(column["task"]) for column in columns]
    for name in list(columns[0])[1:]:
        duplicates = {label for label, count in Counter(labels).items() if count > 1}
        for duplicate in duplicates:
            indices = [index for index, other in enumerate(labels) if other == duplicate]
            values = [columns[index][name] for index in indices]
            kinds = list(dict.fromkeys(values))
            if len(kinds) > 1:
                for index, value in zip(indices, values, strict=True):
                    # A wording is long: the label has its number, the JSON its text.
                    text = kinds.index(value) + 1 if name == "wording" else printable(str(value))
                    labels[index] = f"{duplicate} {name}={text}"
    return _unique(labels)


def _sort_key(row: tuple[str, Settings]) -> tuple[Any, ...]:
    """By method, then by settings, numerically where they are numbers: rank 5 before rank 10."""
    method, settings = row
    return method, [
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value)) for value in settings.values()
    ]
