"""Report the results of runs as tables, plots and an HTML page.

In this order: read.py (runs from disk), groups.py and statistics.py (means over seeds), grid.py (rows and columns),
compare.py (paired differences), then tables.py with formats.py, plots.py with plot_style.py, and page.py.
"""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from softprompt import files, runs
from softprompt.analysis.report import formats, tables
from softprompt.analysis.report.compare import Difference, differences
from softprompt.analysis.report.grid import Grid, arrange
from softprompt.analysis.report.groups import group
from softprompt.analysis.report.read import SkippedRun, read

if TYPE_CHECKING:
    from softprompt.analysis.report.plot_style import Plot
    from softprompt.analysis.report.plots import Split

Form = Literal["text", "markdown", "csv", "latex"]
_VALUES = "results.json"


@final
@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a set of runs, and the files that were written."""

    grid: Grid
    """The content of the tables."""
    differences: tuple[Difference, ...]
    skipped: tuple[SkippedRun, ...]
    files: tuple[Path, ...]
    """All files that were written; the page is first."""
    tables: tuple[tables.Table, ...]

    def render(self, form: Form) -> str:
        """The tables in a format, as the file of that format has them."""
        return formats.render(form, self.tables, self.grid)


def report(
    folders: Sequence[str | Path],
    *,
    out: str | Path = "report",
    compare: str | None = None,
    choose: bool = False,
    rates_on: "Split" = "dev",
    title: str = "Prompt runs compared",
) -> Report:
    """Write tables, plots and a page of every finished run in and below `folders`; all other runs are listed.

    A score is the mean over runs that differ only in the seed; nothing else is ever averaged.

    Args:
        folders: runs, or folders that hold runs.
        out: the folder to write; files of an earlier report in it are replaced, and its further plots removed.
        compare: a row or a method; every other row's difference from it is shown, paired by seed.
        choose: of each method and task show only the settings with the best development score.
        rates_on: the split whose score is plotted by learning rate.
        title: the page's title.

    Raises:
        FileNotFoundError: one of `folders` does not exist.
        ModuleNotFoundError: the extra `report` is not installed.
        ValueError: no finished run, no row named `compare`, or `out` is a run itself.
    """
    _check_extra()
    if not folders:
        raise ValueError("no folder is given; name runs, or folders that hold runs")
    folder = Path(out).expanduser()
    if (folder / runs.RECORD).exists():
        raise ValueError(f"{folder} is a run, but a report is not written into one; choose another --out")
    results, unread = read(folders)
    groups, duplicates = group(results)
    skipped = (*unread, *duplicates)
    if not groups:
        names = ", ".join(map(str, folders))
        reason = f": {skipped[0].folder}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"there is no finished run in {names}{reason}")
    grid = arrange(groups, choose=choose)
    compared = tuple(differences(grid, compare)) if compare else ()
    score_tables = [tables.scores(grid), tables.details(grid)]
    further = [
        table
        for table in (tables.distillation(grid), tables.comparison(compared, compare) if compare else None)
        if table is not None
    ]
    all_tables = [*score_tables, *further]
    plots = _plots(arrange(groups), rates_on)
    from softprompt.analysis.report.page import page

    texts = {"report.html": page(title, grid, score_tables, further, plots, skipped)}
    texts |= {formats.FORMATS[form][0]: formats.render(form, all_tables, grid) for form in formats.FORMATS}
    all_plots = [plot for _, section in plots for plot in section]
    file_names = [*texts, _VALUES, *(f"{plot.name}.{kind}" for plot in all_plots for kind in ("png", "svg"))]
    texts[_VALUES] = formats.json_text({**formats.to_json(grid, compared, skipped), "files": file_names})
    earlier = _earlier_plots(folder)
    paths = [*_write_texts(folder, texts), *_write_plots(folder, all_plots)]
    for name in earlier - set(file_names):
        (folder / name).unlink(missing_ok=True)
    return Report(grid=grid, differences=compared, skipped=skipped, files=tuple(paths), tables=tuple(all_tables))


def _plots(grid: Grid, rates_on: "Split") -> "list[tuple[str, list[Plot]]]":
    from softprompt.analysis.report.plots import plot_learning, plot_rates, plot_sizes

    learning = [plot_learning(grid, number, column) for number, column in enumerate(grid.columns, 1)]
    rates = plot_rates(grid, rates_on)
    return [
        ("Score by trainable parameters", [plot_sizes(grid)]),
        ("Score by learning rate", [rates] if rates else []),
        ("Learning curves", [plot for plot in learning if plot]),
    ]


def _earlier_plots(folder: Path) -> set[str]:
    """The plots in `folder` that an earlier report wrote, by its own list; empty where that cannot be read."""
    try:
        names = files.read_json(folder / _VALUES).get("files")
    except (OSError, ValueError):
        return set()
    plot = re.compile(r"(learning-\d+|sizes|rates-(dev|test))\.(png|svg)")
    return {
        name for name in (names if isinstance(names, list) else []) if isinstance(name, str) and plot.fullmatch(name)
    }


def _write_texts(folder: Path, texts: dict[str, str]) -> list[Path]:
    for name, text in texts.items():
        files.write_text(folder / name, text)
    return [folder / name for name in texts]


def _write_plots(folder: Path, plots: "Sequence[Plot]") -> list[Path]:
    paths = []
    for plot in plots:
        with files.atomic_write(folder / f"{plot.name}.png") as draft:
            draft.write_bytes(plot.png)
        files.write_text(folder / f"{plot.name}.svg", plot.svg)
        paths += [folder / f"{plot.name}.png", folder / f"{plot.name}.svg"]
    return paths


def _check_extra() -> None:
    if missing := [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"a report needs the extra `report` ({', '.join(missing)}); install it in softprompt's clone with: "
            "pip install '.[report]'"
        )
