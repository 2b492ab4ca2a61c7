"""`softprompt report`: tables and plots of runs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from softprompt.analysis.report import Form, report
from softprompt.analysis.report.formats import to_json
from softprompt.cli.console import console


def report_(
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS...")],
    out: Path = Path("report"),
    format: Form = "text",
    compare: str | None = None,
    choose: bool = False,
    rates_on: Literal["dev", "test"] = "dev",
    title: str = "Prompt runs compared",
) -> dict[str, Any]:
    """Make tables and plots of runs.

    Args:
        folders: Runs, or folders that hold runs.
        out: The folder to write: report.html, the tables in every format, the plots as PNG and SVG.
        format: The format of the tables shown here.
        compare: A row or a method: every other row's difference from it is shown, paired by seed.
        choose: Of each method and task show only the settings with the best development score.
        rates_on: The split whose score is plotted by learning rate; select a rate on dev.
        title: The page's title.
    """
    result = report(folders, out=out, compare=compare, choose=choose, rates_on=rates_on, title=title)
    console.print(result.render(format), soft_wrap=True)
    for run in result.skipped:
        console.print(f"skipped: {run.folder}: {run.reason}", soft_wrap=True)
    console.print(f"page: {result.files[0]}", soft_wrap=True)
    return {
        "command": "report",
        "out": str(out),
        "runs": sum(len(group.results) for group in result.grid.groups),
        "files": [str(path) for path in result.files],
        **to_json(result.grid, result.differences, result.skipped),
    }
