"""The commands `evaluate`, `predict`, `list`, `fetch` and `doctor`.

Each command is a function: its signature defines the flags, its docstring their help, and it returns plain values.
Imports are inside the functions, so that `softprompt evaluate --help` does not load torch.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from softprompt.cli.console import console, show_table
from softprompt.types import DecodeWeights

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def evaluate_(
    run: RunFolder,
    task: str | None = None,
    data: str | None = None,
    split: Literal["test", "dev", "train"] | None = None,
    backbone: str | None = None,
    generate: bool = False,
    decode_weights: DecodeWeights = "auto",
) -> dict[str, Any]:
    """Score a run, or a prompt that PEFT trained.

    Args:
        run: The run's folder, or a stock PEFT prompt folder with --task.
        task: Another task than the run's own: a name, or a TOML file.
        data: A file of rows (for images also a folder), all of which are scored, or a benchmark's official folder;
            None: the run's rows, or those of --task.
        split: The split to score; None: test. Not with a file, all of whose rows are scored.
        backbone: Where the run's backbone is now, as in train; None: where it was during training.
        generate: In classification, also let the model generate freely, and report how often its text begins with a
            label word (label_word_rate) and with the right one (generated_accuracy).
        decode_weights: The weights that generation reads on a CPU: the model's own (original), a copy of them in the
            order that suits the CPU (prepacked: the same up to rounding), or one of 8 or 4 bits per weight (faster for
            few rows at a time, and texts may differ); auto: prepacked where the copy takes at most 1 GiB, else
            original.
    """
    from softprompt import runs
    from softprompt.evaluation.evaluate import evaluate

    opened = runs.resolve_prompt(run, task)
    _show_base_note(opened, backbone)
    score = evaluate(
        opened, task=task, data=data, split=split, backbone=backbone, generate=generate, decode_weights=decode_weights
    )
    if score.warning:
        console.print(f"note: {score.warning}")
    return {
        "command": "evaluate",
        "run": str(run),
        "task": task or opened.task.name,
        "data": data,
        "split": split or ("test" if data is None or Path(data).is_dir() else None),
        **dataclasses.asdict(score),
    }


def predict_(
    run: RunFolder,
    input: Path,
    output: Path | None = None,
    task: str | None = None,
    backbone: str | None = None,
    decode_weights: DecodeWeights = "auto",
) -> dict[str, Any] | None:
    """Predict the answers to the rows of a file.

    Args:
        run: The run's folder, or a stock PEFT prompt folder with --task.
        input: CSV, TSV, JSONL, JSON or Parquet file with the template's columns; labels are not needed. For a task
            with images also an image, or a folder of images.
        output: JSONL file to write, with a line per row, counted from 1; None: the same lines on stdout alone.
        task: The task of a PEFT folder: a name, or a TOML file; a run has its own.
        backbone: Where the run's backbone is now, as in train; None: where it was during training.
        decode_weights: The weights that generation reads on a CPU, as in evaluate; not for a task with labels.
    """
    from softprompt import files, runs
    from softprompt.evaluation.predict import predict
    from softprompt.tasks.data.images import unlabeled_images
    from softprompt.tasks.data.tabular import task_rows

    if output is not None:
        files.check_output(output, input)
    opened = runs.resolve_prompt(run, task)
    runs.check_has_own_task(opened, task)
    _show_base_note(opened, backbone)
    rows = (
        unlabeled_images(opened.task, input)
        if opened.task.image
        else list(task_rows(opened.task, input, answers=False))
    )
    answers = predict(opened, rows, backbone=backbone, decode_weights=decode_weights)
    lines = [
        runs.json_line(_answer_json(answer, opened.task.image and opened.task.render(rows[answer.row])))
        for answer in answers
    ]
    if output is None:
        sys.stdout.writelines(lines)
        return None
    files.write_text(output, "".join(lines))
    return {"command": "predict", "run": str(run), "rows": len(lines), "output": str(output)}


def _show_base_note(opened: Any, backbone: str | None) -> None:
    """Show that a PEFT folder names another base model than the backbone that is asked for."""
    from softprompt import runs

    if isinstance(opened, runs.PeftPrompt) and backbone is not None and (note := opened.adapter.base_note(backbone)):
        console.print(f"note: {note}")


def list_(
    what: Annotated[Literal["methods", "tasks", "assets", "runs"], tyro.conf.Positional],
    dim: int = 768,
    out: Path = Path("runs"),
) -> list[dict[str, Any]]:
    """List methods, tasks, assets or runs.

    Args:
        what: What to list.
        dim: Embedding width of the backbone, to count the methods' trainable parameters.
        out: Folder that holds the runs.
    """
    if dim < 1:
        raise ValueError(f"dim is {dim}; it must be at least 1")
    kinds: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": lambda: _methods(dim),
        "tasks": _tasks,
        "assets": _assets,
        "runs": lambda: _runs(out),
    }
    rows = kinds[what]()
    show_table(rows)
    return rows


def fetch_(asset: Annotated[str, tyro.conf.Positional]) -> dict[str, Any]:
    """Download an asset.

    Args:
        asset: The asset's name; see softprompt list assets.
    """
    from softprompt import assets

    path = assets.fetch(asset)
    return {"command": "fetch", "asset": asset, "path": str(path), "license": assets.ASSETS[asset].license}


def doctor_() -> dict[str, Any]:
    """Show what a bug report needs."""
    import torch

    from softprompt import assets, backbones, runs

    devices = ["cpu", *(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(backbones.measured_dtype(device)).removeprefix("torch.")
    present = {str(asset["name"]): bool(asset["present"]) for asset in assets.status()}
    report = {
        "versions": runs.versions(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "cache": str(assets.cache_folder()),
        "assets": present,
    }
    for key, value in report.items():
        console.print(f"{key:<9} {value}")
    return {"command": "doctor", **report}


def _methods(dim: int) -> list[dict[str, Any]]:
    from softprompt.prompts import METHODS

    return [
        {"name": name, "count": config().count(dim), "folds": config.folds} for name, config in sorted(METHODS.items())
    ]


def _tasks() -> list[dict[str, Any]]:
    from softprompt.tasks import TASKS

    return [{"name": task.name, "description": task.description} for task in TASKS.values()]


def _assets() -> list[dict[str, Any]]:
    from softprompt import assets

    return assets.status()


def _runs(out: Path) -> list[dict[str, Any]]:
    from softprompt import runs

    return [_run_json(folder) for folder in runs.run_folders(out)]


def _run_json(folder: Path) -> dict[str, Any]:
    from softprompt import runs

    try:
        run = runs.open_run(folder)
    except ValueError as error:
        return {"name": folder.name, "finished": False, "problem": str(error)}
    results = run.results or {}
    return {
        "name": run.name,
        "task": run.task.name,
        "method": run.experiment.method,
        "seed": run.experiment.seed,
        "metric": results.get("metric"),
        "test": results.get("test"),
        "trainable": results.get("trainable"),
        "finished": run.results is not None,
    }


def _answer_json(answer: Any, image: str = "") -> dict[str, Any]:
    values = {"row": answer.row + 1, **({"image": image} if image else {}), "answer": answer.label or answer.text}
    return {**values, "probabilities": dict(answer.probabilities)} if answer.label else values
