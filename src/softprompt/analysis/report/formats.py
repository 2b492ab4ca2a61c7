"""A table as terminal text, Markdown or LaTeX, and all cells as CSV; every text in them may be hostile."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from softprompt.analysis.report.compare import Difference
from softprompt.analysis.report.grid import Grid
from softprompt.analysis.report.groups import Interval
from softprompt.analysis.report.read import Result, SkippedRun, printable
from softprompt.analysis.report.tables import Table

_WIDTH = 110
"""Columns of text; a wider table goes on below, its first columns again."""


def text(tables: Sequence[Table]) -> str:
    """Columns of equal width, in pieces that fit a terminal."""
    parts = []
    for table in tables:
        pieces = ["\n".join(_text_rows(table, columns)) for columns in _pieces(table)]
        parts.append("\n\n".join([f"{table.title}\n{'=' * len(table.title)}", *pieces, *table.notes]))
    return "\n\n\n".join(parts) + "\n"


def _widths(table: Table) -> list[int]:
    lines = [table.head, *table.rows]
    return [max(len(part) for line in lines for part in line[place].split("\n")) for place in range(len(table.head))]


def _pieces(table: Table) -> list[list[int]]:
    """Which columns stand beside each other; the words at the left are in every piece."""
    widths, words = _widths(table), list(range(table.words))
    pieces = [list(words)]
    for place in range(table.words, len(table.head)):
        if len(pieces[-1]) > len(words) and sum(widths[p] + 2 for p in [*pieces[-1], place]) > _WIDTH:
            pieces.append(list(words))
        pieces[-1].append(place)
    return pieces


def _text_rows(table: Table, columns: Sequence[int]) -> list[str]:
    widths = _widths(table)
    lines: list[str] = []
    for number, row in enumerate([table.head, *table.rows]):
        cells = [row[place].split("\n") for place in columns]
        for depth in range(max(map(len, cells))):
            parts = [cell[depth] if depth < len(cell) else "" for cell in cells]
            placed = [
                part.ljust(widths[place]) if place < table.words else part.rjust(widths[place])
                for part, place in zip(parts, columns, strict=True)
            ]
            lines.append("  ".join(placed).rstrip())
        if number in (0, table.references):
            lines.append("-" * (sum(widths[place] + 2 for place in columns) - 2))
    return lines[:-1] if not table.rows else lines


def markdown(tables: Sequence[Table]) -> str:
    """Pipe tables."""
    parts = []
    for table in tables:
        rule = "|".join(["", *(":--" if place < table.words else "--:" for place in range(len(table.head))), ""])
        head, *rows = ["| " + " | ".join(map(_in_markdown, row)) + " |" for row in (table.head, *table.rows)]
        notes = [_in_markdown(note) for note in table.notes]
        parts.append("\n\n".join([f"## {_in_markdown(table.title)}", "\n".join([head, rule, *rows]), *notes]))
    return "\n\n".join(parts) + "\n"


def _in_markdown(words: str) -> str:
    # `<` before all: what is left of it may be HTML, which Markdown passes on.
    plain = words.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", plain).replace("\n", "<br>")


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
    """`table` environments with booktabs' rules."""
    parts = [r"% \usepackage{booktabs}; a wide table may want \resizebox{\textwidth}{!}{...} around its tabular"]
    for table in tables:
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_in_latex(' '.join([table.title + '.', *table.notes]))}}}",
        ]
        lines += [rf"\begin{{tabular}}{{{'l' * table.words}{'r' * (len(table.head) - table.words)}}}", r"\toprule"]
        for number, row in enumerate([table.head, *table.rows]):
            lines += _latex_rows(row)
            if number in (0, table.references) and number < len(table.rows):
                lines.append(r"\midrule")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"


def _latex_rows(row: Sequence[str]) -> list[str]:
    cells = [cell.split("\n") for cell in row]
    lines = []
    for depth in range(max(map(len, cells))):
        parts = [_in_latex(cell[depth]) if depth < len(cell) else "" for cell in cells]
        small = [rf"{{\scriptsize {part}}}" if part and depth else part for part in parts]
        lines.append(" & ".join(small) + r" \\")
    # A line that begins with a bracket would be read as the space after \\.
    return [re.sub(r"^\s*\[", "{[}", line) for line in lines]


def _in_latex(words: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in words)


_COUNTS = ("n_dev", "n_test", "trainable", "steps", "best_step")


def cells(grid: Grid) -> list[dict[str, Any]]:
    """Plain values of every cell: what was trained, and its scores as fractions."""
    found = []
    for row in grid.rows:
        for column, group in [(name, grid.cells.get((row.label, name))) for name in grid.columns]:
            if group is None:
                continue
            test, dev = group.spread("test"), group.spread("dev")
            found.append(
                {
                    "row": row.label,
                    "method": printable(group.method),
                    "task": column,
                    "chosen": grid.chosen.get((row.label, column)),
                    "metric": group.metric,
                    "seeds": list(group.seeds),
                    "test": test.mean,
                    "test_sd": test.deviation,
                    "test_rows_interval": _ends(group.rows_interval),
                    "test_seeds_interval": _ends(test.interval),
                    "majority": group.spread("majority").mean,
                    "against_majority": group.standing,
                    "n_test": [int(value) for value in group.spread("n_test").values],
                    "dev": dev.mean,
                    "dev_sd": dev.deviation,
                    "zero_shot": group.zero_shot,
                    "trainable": int(max(group.spread("trainable").values)),
                    "bytes": max(result.size for result in group.results),
                    "seconds": group.spread("seconds").mean,
                    "selection_warning": group.selection_warning or None,
                    "settings": {**group.settings},
                    "task_settings": {**group.column},
                    "runs": [_run(result) for result in group.results],
                }
            )
    return found


def _run(result: Result) -> dict[str, Any]:
    numbers = {name: int(value) if name in _COUNTS else value for name, value in result.numbers.items()}
    return {
        "name": result.name,
        "seed": result.seed,
        **numbers,
        "extra_metrics": {**result.extra_metrics},
        "bytes": result.size,
    }


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def comma_separated(grid: Grid) -> str:
    """A line a cell with every setting; scores are fractions here."""
    rows = []
    for cell in cells(grid):
        flat = {name: value for name, value in cell.items() if name not in ("settings", "task_settings", "runs")}
        for name in ("test_rows_interval", "test_seeds_interval"):
            ends = flat.pop(name) or (None, None)
            flat |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
        flat |= {name: " ".join(map(str, cell[name])) for name in ("seeds", "n_test")}
        kept = {name: value for name, value in cell["task_settings"].items() if name != "wording"}
        rows.append({**flat, **{f"setting_{name}": value for name, value in {**kept, **cell["settings"]}.items()}})
    stream = io.StringIO()
    table = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows({name: _in_csv(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _in_csv(value: Any) -> Any:
    """A text that a spreadsheet would compute is kept a text by an apostrophe."""
    return f"'{printable(value)}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def whole(grid: Grid, found: Sequence[Difference], left_out: Sequence[SkippedRun]) -> dict[str, Any]:
    """All of a report as plain values; scores are fractions."""
    return {
        "cells": cells(grid),
        "common": {**grid.common},
        "differences": [
            {
                "row": one.row,
                "task": one.column,
                "difference": one.spread.mean,
                "interval": _ends(one.interval),
                "seeds": list(one.seeds),
                "verdict": one.verdict,
            }
            for one in found
        ],
        "left_out": [{"folder": one.folder, "reason": one.reason} for one in left_out],
    }


FORMATS: dict[str, tuple[str, Callable[[Sequence[Table]], str] | None]] = {
    "text": ("results.txt", text),
    "markdown": ("results.md", markdown),
    "latex": ("results.tex", latex),
    "csv": ("results.csv", None),
}
"""File and writer of each; CSV is written from the grid."""


def written(form: str, tables: Sequence[Table], grid: Grid) -> str:
    """The report in this format."""
    write = FORMATS[form][1]
    return comma_separated(grid) if write is None else write(tables)


def json_text(values: Any) -> str:
    """With a line for each value, and no NaN."""
    return json.dumps(values, indent=1, allow_nan=False) + "\n"
