"""Write tables as text, Markdown or LaTeX, and all cells as CSV and JSON; any text in them may be hostile."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from softprompt.analysis.report.compare import Difference
from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.read import Result, SkippedRun, printable
from softprompt.analysis.report.statistics import Interval
from softprompt.analysis.report.tables import Table

_WIDTH = 110
"""Characters per line; a wider table continues below, with its text columns repeated."""


def text(tables: Sequence[Table]) -> str:
    """Aligned columns, in pieces that fit a terminal."""
    parts = []
    for table in tables:
        pieces = ["\n".join(_text_rows(table, columns)) for columns in _pieces(table)]
        parts.append("\n\n".join([f"{table.title}\n{'=' * len(table.title)}", *pieces, *table.notes]))
    return "\n\n\n".join(parts) + "\n"


def _widths(table: Table) -> list[int]:
    lines = [table.head, *table.rows]
    return [max(len(part) for line in lines for part in line[column].split("\n")) for column in range(len(table.head))]


def _pieces(table: Table) -> list[list[int]]:
    """The columns of each piece; the text columns are in every piece."""
    widths, text_columns = _widths(table), list(range(table.text_columns))
    pieces = [list(text_columns)]
    for column in range(table.text_columns, len(table.head)):
        width = sum(widths[other] + 2 for other in [*pieces[-1], column])
        if len(pieces[-1]) > len(text_columns) and width > _WIDTH:
            pieces.append(list(text_columns))
        pieces[-1].append(column)
    return pieces


def _text_rows(table: Table, columns: Sequence[int]) -> list[str]:
    widths = _widths(table)
    lines: list[str] = []
    for number, row in enumerate([table.head, *table.rows]):
        cells = [row[column].split("\n") for column in columns]
        for line in range(max(map(len, cells))):
            parts = [cell[line] if line < len(cell) else "" for cell in cells]
            aligned = [
                part.ljust(widths[column]) if column < table.text_columns else part.rjust(widths[column])
                for part, column in zip(parts, columns, strict=True)
            ]
            lines.append("  ".join(aligned).rstrip())
        if number in (0, table.reference_rows):
            lines.append("-" * (sum(widths[column] + 2 for column in columns) - 2))
    return lines[:-1] if not table.rows else lines


def markdown(tables: Sequence[Table]) -> str:
    """Pipe tables."""
    parts = []
    for table in tables:
        columns = range(len(table.head))
        rule = "|".join(["", *(":--" if column < table.text_columns else "--:" for column in columns), ""])
        head, *rows = ["| " + " | ".join(map(_in_markdown, row)) + " |" for row in (table.head, *table.rows)]
        notes = [_in_markdown(note) for note in table.notes]
        parts.append("\n\n".join([f"## {_in_markdown(table.title)}", "\n".join([head, rule, *rows]), *notes]))
    return "\n\n".join(parts) + "\n"


def _in_markdown(text: str) -> str:
    # Markdown passes HTML on, so `<` is escaped first.
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escaped).replace("\n", "<br>")


_LATEX = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "§": r"$^\S$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def latex(tables: Sequence[Table]) -> str:
    """`table` environments with the rules of booktabs."""
    parts = [r"% \usepackage{booktabs}; a wide table may want \resizebox{\textwidth}{!}{...} around its tabular"]
    for table in tables:
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_in_latex(' '.join([table.title + '.', *table.notes]))}}}",
        ]
        lines += [
            rf"\begin{{tabular}}{{{'l' * table.text_columns}{'r' * (len(table.head) - table.text_columns)}}}",
            r"\toprule",
        ]
        for number, row in enumerate([table.head, *table.rows]):
            lines += _latex_rows(row)
            if number in (0, table.reference_rows) and number < len(table.rows):
                lines.append(r"\midrule")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _latex_rows(row: Sequence[str]) -> list[str]:
    cells = [cell.split("\n") for cell in row]
    lines = []
    for line in range(max(map(len, cells))):
        parts = [_in_latex(cell[line]) if line < len(cell) else "" for cell in cells]
        small = [rf"{{\scriptsize {part}}}" if part and line else part for part in parts]
        lines.append(" & ".join(small) + r" \\")
    # A line that begins with a bracket would be read as the optional argument of \\.
    return [re.sub(r"^\s*\[", "{[}", line) for line in lines]


def _in_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


_COUNTS = ("n_dev", "n_test", "trainable", "steps", "best_step")


def cells(grid: Grid) -> list[dict[str, Any]]:
    """Plain values of every cell: its settings, and its scores as fractions."""
    cells = []
    for row in grid.rows:
        for column, group in [(name, grid.cells.get((row.label, name))) for name in grid.columns]:
            if group is None:
                continue
            test, dev = group.spread("test"), group.spread("dev")
            cells.append(
                {
                    "row": row.label,
                    "method": printable(group.method),
                    "task": column,
                    "best_settings": grid.best_settings.get((row.label, column)),
                    "metric": group.metric,
                    "seeds": list(group.seeds),
                    "test": test.mean,
                    "test_sd": test.deviation,
                    "test_rows_interval": _ends(group.rows_interval),
                    "test_seeds_interval": _ends(test.interval),
                    "majority": group.spread("majority").mean,
                    "against_majority": group.against_majority,
                    "n_test": [int(value) for value in group.spread("n_test").values],
                    "dev": dev.mean,
                    "dev_sd": dev.deviation,
                    "zero_shot": group.zero_shot,
                    "trainable": int(max(group.spread("trainable").values)),
                    "bytes": max(result.size for result in group.results),
                    "seconds": group.spread("seconds").mean,
                    "selection_warning": group.selection_warning or None,
                    "settings": {**group.settings},
                    "task_settings": {**group.task_settings},
                    "runs": [_run(result) for result in group.results],
                }
            )
    return cells


def _run(result: Result) -> dict[str, Any]:
    values = {name: int(value) if name in _COUNTS else value for name, value in result.values.items()}
    return {
        "name": result.name,
        "seed": result.seed,
        **values,
        "extra_metrics": {**result.extra_metrics},
        "distillation": {name: {**model} for name, model in result.distillation.items()} or None,
        "bytes": result.size,
    }


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def comma_separated(grid: Grid) -> str:
    """A line per cell with every setting; scores are fractions."""
    rows = []
    for cell in cells(grid):
        flat = {name: value for name, value in cell.items() if name not in ("settings", "task_settings", "runs")}
        for name in ("test_rows_interval", "test_seeds_interval"):
            ends = flat.pop(name) or (None, None)
            flat |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
        flat |= {name: " ".join(map(str, cell[name])) for name in ("seeds", "n_test")}
        task_settings = {name: value for name, value in cell["task_settings"].items() if name != "wording"}
        settings = {**task_settings, **cell["settings"]}
        rows.append({**flat, **{f"setting_{name}": value for name, value in settings.items()}})
    stream = io.StringIO()
    table = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows({name: _in_csv(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _in_csv(value: Any) -> Any:
    """Prefix a text that a spreadsheet would evaluate with an apostrophe."""
    return f"'{printable(value)}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def to_json(grid: Grid, differences: Sequence[Difference], skipped: Sequence[SkippedRun]) -> dict[str, Any]:
    """The report as plain values; scores are fractions."""
    return {
        "cells": cells(grid),
        "common": {**grid.common},
        "differences": [
            {
                "row": difference.row,
                "task": difference.column,
                "difference": difference.mean,
                "interval": _ends(difference.interval),
                "seeds": list(difference.seeds),
                "verdict": difference.verdict,
            }
            for difference in differences
        ],
        "skipped": [{"folder": run.folder, "reason": run.reason} for run in skipped],
    }


FORMATS: dict[str, tuple[str, Callable[[Sequence[Table]], str] | None]] = {
    "text": ("results.txt", text),
    "markdown": ("results.md", markdown),
    "latex": ("results.tex", latex),
    "csv": ("results.csv", None),
}
"""File name and writer of each format; CSV is written from the grid."""


def render(form: str, tables: Sequence[Table], grid: Grid) -> str:
    """The tables, or the grid's cells, in this format."""
    write = FORMATS[form][1]
    return comma_separated(grid) if write is None else write(tables)


def json_text(values: Any) -> str:
    """JSON with a line per value, and no NaN."""
    return json.dumps(values, indent=1, allow_nan=False) + "\n"
