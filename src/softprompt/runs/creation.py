"""Create a run's folder: checked before anything is loaded, claimed in one rename."""

import errno
import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from softprompt import __version__, files
from softprompt.backbones import Backbone
from softprompt.config import Experiment
from softprompt.runs.run import CONTEXT, FORMAT, RECORD, Run, init_prompt_hash, text_hash
from softprompt.tasks import Task

_NARROWER = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_NAME_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES)
"""Errors of renaming a folder to a name that is taken, which depend on the system."""


def create(
    experiment: Experiment,
    task: Task,
    backbone: Backbone,
    out: Path,
    name: str | None,
    data: Mapping[str, str],
    context: str = "",
    demonstrations: str = "",
) -> Run:
    """Create the folder `out/name` with the experiment's record.

    Args:
        name: None: made from task, method and seed, with a number if that is taken.
        data: the fingerprints of the rows, `Splits.fingerprints`.
        context: the text that is distilled; empty: none is.
        demonstrations: the end of it that was sampled from the training rows.

    Raises:
        FileExistsError: `name` is taken.
        ValueError: `name` is not a plain folder name.
    """
    stem = f"{task.name}-{experiment.method}-{experiment.seed}"
    files.check_name(stem, "run name")
    check_new_run(out, name)
    from_file = context.removesuffix(demonstrations).rstrip()
    record = {
        "format": FORMAT,
        "hash": experiment.hash,
        "experiment": experiment.to_json(),
        "task": task.to_json(),
        "data": dict(data),
        "context": text_hash(context) if context else None,
        "context_file": text_hash(from_file) if from_file else None,
        "init_prompt": init_prompt_hash(experiment),
        "backbone": {
            "base": backbone.base,
            "dim": backbone.dim,
            "hash": backbone.hash,
            "dtype": backbone.precision,
            "rounded": _rounded_hashes(backbone),
            "architecture": backbone.architecture,
            "note": backbone.note,
        },
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": None,
    }
    contents = {RECORD: json.dumps(record, indent=1)} | ({CONTEXT: context} if context else {})
    return Run(_claim(out, name, stem, contents), experiment, task, record)


def _rounded_hashes(backbone: Backbone) -> dict[str, str]:
    """The weights' hash in each narrower dtype in which they might be loaded later, where it can be known."""
    hashes = {name: backbone.hash_as(dtype) for name, dtype in _NARROWER.items()}
    return {name: known for name, known in hashes.items() if known}


def check_new_run(out: Path, name: str | None) -> None:
    """Check that `create` can create `out/name`, before anything is loaded.

    Raises:
        FileExistsError: `name` is taken.
        ValueError: `name` is not a plain folder name.
        OSError: `out` is not writable.
    """
    if name is not None:
        files.check_name(name, "run name")
        if (out / name).exists():
            raise FileExistsError(_taken_message(out / name))
    files.check_writable(out, "choose another --out")


def _taken_message(folder: Path) -> str:
    return f"run {folder} exists and is never overwritten; choose another --name, or use --resume {folder}"


def versions() -> dict[str, str]:
    """The versions of Python, softprompt and the libraries that determine results."""
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors")
    return {
        "softprompt": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _claim(out: Path, name: str | None, stem: str, contents: Mapping[str, str]) -> Path:
    """Create a folder with its first files in one rename, so that two processes never get the same one.

    Raises:
        FileExistsError: `name` is taken; or without a name, all of 9,999 names are.
    """
    for count in range(1, 10_000):
        folder = out / (name or (stem if count == 1 else f"{stem}-{count}"))
        try:
            with files.atomic_write(folder) as draft:
                draft.mkdir()
                for file, text in contents.items():
                    (draft / file).write_text(text, encoding="utf-8")
        except OSError as error:
            if error.errno not in _NAME_TAKEN or not folder.exists():
                raise
            if name is not None:
                raise FileExistsError(_taken_message(folder)) from None
        else:
            return folder
    raise FileExistsError(f"{out} has 9,999 runs named {stem}; give a --name")
