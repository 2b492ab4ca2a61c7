"""`softprompt export`: runs' prompts for other software."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from softprompt import runs
from softprompt.cli.console import console
from softprompt.export import FORMATS, export_runs

FormatName: Any = Literal[tuple(FORMATS)]
"""Every format of export, as `--to` takes it."""


def export_(
    runs_: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", name="runs")],
    to: FormatName = "peft",
    output: Path | None = None,
    token_names: tuple[str, ...] = (),
    backbone: str | None = None,
) -> dict[str, Any]:
    """Write runs' prompts for other software, read the files back and compare.

    Args:
        runs_: The runs' folders; several, of one backbone, where the format holds several prompts.
        to: The format; see docs/export.md.
        output: The folder to write; none: RUN-FORMAT beside the first run.
        words: With vocab: what a run's prompt is called in text, NAME=<word>; by default <prompt-NAME>.
        backbone: Where the runs' backbone lies now, as in train; none: where they had it.
    """
    if not runs_:
        raise ValueError("no run is given; name at least one run's folder")
    if unclear := [word for word in token_names if "=" not in word]:
        raise ValueError(f"token_names holds {unclear[0]!r}; give NAME=<word>, NAME being a run's folder name")
    opened = [runs.open_run(run) for run in runs_]
    folder = output or opened[0].folder.with_name(f"{opened[0].name}-{to}")
    named = dict(word.split("=", 1) for word in token_names)
    if len(named) < len(token_names):
        raise ValueError(f"token_names names a run twice ({', '.join(token_names)}); give each run one word")
    measured = export_runs(opened, FORMATS[to], folder, backbone=backbone, token_names=named)
    console.print(
        f"compared with the run: largest difference {measured['largest_difference']:.2g} ({measured['unit']}), "
        f"tolerance {measured['tolerance']:.2g}"
    )
    return {"command": "export", "runs": [str(run) for run in runs_], "to": to, "output": str(folder), **measured}
