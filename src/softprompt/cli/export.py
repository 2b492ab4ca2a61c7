"""`softprompt export`: write runs' prompts for other software."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from softprompt import runs
from softprompt.assets.hub import is_hub_prompt
from softprompt.cli.console import console
from softprompt.export import FORMATS, export_runs
from softprompt.export.gguf import Gguf
from softprompt.export.gguf_writer import GgufType

FormatName: Any = Literal[tuple(FORMATS)]
"""The values of `--to`."""


def export_(
    runs_: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", name="runs")],
    to: FormatName = "peft",
    output: Path | None = None,
    token_names: tuple[str, ...] = (),
    gguf_type: GgufType = "f16",
    task: str | None = None,
    backbone: str | None = None,
) -> dict[str, Any]:
    """Write runs' prompts for other software, read the files back and compare.

    Args:
        runs_: The runs' folders, or stock PEFT prompt folders with --task; several of one backbone where the format
            holds several prompts.
        to: The format; see docs/export.md.
        output: The folder to write; None: RUN-FORMAT next to the first run.
        token_names: With vocab and gguf: a prompt's name in text, NAME=<name>; by default <prompt-NAME>.
        gguf_type: With gguf: how the weights are stored.
        task: The task of PEFT folders: a name, or a TOML file; runs have their own.
        backbone: Where the runs' backbone is now, as in train; None: where it was during training.
    """
    if not runs_:
        raise ValueError("no run is given; name at least one run's folder")
    if malformed := [pair for pair in token_names if "=" not in pair]:
        raise ValueError(f"token_names holds {malformed[0]!r}; give NAME=<name>, where NAME is a run's folder name")
    if output is None and is_hub_prompt(runs_[0]):
        raise ValueError(f"{runs_[0]} has no folder to write next to; give --output")
    opened = [runs.resolve_prompt(run, task) for run in runs_]
    if all(isinstance(run, runs.Run) for run in opened):
        runs.check_has_own_task(opened[0], task)
    folder = output or opened[0].folder.with_name(f"{opened[0].name}-{to}")
    by_run = dict(pair.split("=", 1) for pair in token_names)
    if len(by_run) < len(token_names):
        raise ValueError(f"token_names names a run twice ({', '.join(token_names)}); give each run one name")
    export_format = FORMATS[to]
    if isinstance(export_format, Gguf):
        export_format = export_format.with_type(gguf_type)
    measured = export_runs(opened, export_format, folder, backbone=backbone, token_names=by_run)
    console.print(
        f"compared with the run: largest difference {measured['largest_difference']:.2g} ({measured['unit']}), "
        f"tolerance {measured['tolerance']:.2g}"
    )
    return {"command": "export", "runs": [str(run) for run in runs_], "to": to, "output": str(folder), **measured}
