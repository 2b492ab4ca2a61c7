"""`softprompt report`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from softprompt.analysis.report import Form, report
from softprompt.analysis.report.formats import whole
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
    """Make tables and pictures of runs.

    Args:
        folders: Runs, or folders that hold runs.
        out: The folder to write: report.html, the tables in every format, the pictures as PNG and SVG.
        format: Of the tables shown here.
        compare: A row or a method: every other row's difference to it is shown, paired by seed.
        choose: Of each method and task show the settings with the best development score alone.
        rates_on: The split whose score is drawn against the learning rate; a rate is chosen on dev.
        title: Of the page.
    """
    made = report(folders, out=out, compare=compare, choose=choose, rates_on=rates_on, title=title)
    console.print(made.written(format), soft_wrap=True)
    for one in made.left_out:
        console.print(f"left out: {one.folder}: {one.reason}", soft_wrap=True)
    console.print(f"page: {made.files[0]}", soft_wrap=True)
    return {
        "command": "report",
        "out": str(out),
        "runs": sum(len(group.results) for group in made.grid.groups),
        "files": [str(path) for path in made.files],
        **whole(made.grid, made.differences, made.left_out),
    }
