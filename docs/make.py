"""Write the reference pages from the code: methods, tasks, assets, commands. `--check` says which have drifted."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from inspect import cleandoc
from pathlib import Path

os.environ["COLUMNS"] = "100"  # the same pages in every terminal

from softprompt import assets
from softprompt.cli import COMMANDS, main
from softprompt.prompts import METHODS
from softprompt.tasks import TASKS

HERE = Path(__file__).parent


def methods() -> str:
    """A section a method, from its docstring and its fields."""
    parts = ["# Methods\n\nMade from the code by `make docs`. Counts are at width 768.\n"]
    for name, config in sorted(METHODS.items()):
        parts.append(f"## {name}\n\n{cleandoc(config.__doc__ or '')}\n")
        parts.append(f"Finished, it is: {config.folds}. Default size: {config().count(768):,} parameters.\n")
        rows = [f"| `{field.name}` | `{field.default!r}` |" for field in dataclasses.fields(config)]
        parts.append("\n".join(["| setting | default |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def tasks() -> str:
    """A row a built-in task."""
    rows = [f"| `{task.name}` | {task.description} | `{task.template!r}` |" for task in TASKS.values()]
    lead = "The built-in tasks. One of your own is a TOML file beside a table: [own-task.md](own-task.md).\n"
    return "\n".join(["# Tasks\n", lead, "| name | | template |", "|---|---|---|", *rows]) + "\n"


def asset_table() -> str:
    """A row an asset."""
    rows = [
        f"| `{asset.name}` | {asset.kind} | {asset.package} {asset.version} | {asset.licence} | {asset.description} |"
        for asset in assets.ASSETS.values()
    ]
    head = ["# Assets\n", "| name | kind | package | licence | |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def commands() -> str:
    """Every command's help."""
    parts = ["# Commands\n"]
    for name, text in COMMANDS.items():
        written = io.StringIO()
        with contextlib.redirect_stdout(written):
            main([name, "--help"])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())
        body = "\n".join(line.rstrip() for line in plain.splitlines()).strip()
        parts.append(f"## softprompt {name}\n\n{text}\n\n```\n{body}\n```\n")
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """Each page's file and text."""
    made = {"methods": methods, "tasks": tasks, "assets": asset_table, "commands": commands}
    return {HERE / f"{name}.md": page() for name, page in made.items()}


def run(arguments: list[str]) -> None:
    """Write them; with `--check`, say which of them the code has left behind."""
    found = pages()
    if arguments == ["--check"]:
        if stale := [file.name for file, text in found.items() if file.read_text(encoding="utf-8") != text]:
            sys.exit(f"{', '.join(stale)} in docs say something else than the code; run: make docs")
        return
    for file, text in found.items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1:])
