"""The user's own tasks: a TOML file next to tables of rows, or a folder of images."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from softprompt.tasks.data.images import folder_task, hub_words, image_words
from softprompt.tasks.data.tabular import read_rows, task_rows
from softprompt.tasks.task import READERS, TASKS, Task, check_no_folder, suggest
from softprompt.tasks.template import label_texts

_SPLITS = ("train", "dev", "test")
_KEYS: dict[str, type] = {
    **dict.fromkeys((*_SPLITS, "name", "description", "template", "label", "target", "group", "question"), str),
    **dict.fromkeys(("image", "broken", "hub", "messages", "assistant_turns"), str),
    **dict.fromkeys(("max_input_tokens", "split_seed"), int),
    "metrics": list,
    "label_words": dict,
}
_KINDS = {str: "text", int: "a whole number", list: "a list of texts", dict: "a table of labels and words"}


def load_task(name: str, data: str | None = None) -> Task:
    """Load a built-in task (`boolq`, or `boolq:dpt` for another wording), or one from a TOML file or an image folder.

    Args:
        name: a name in `TASKS`, a path that ends in `.toml`, or a folder with a folder of images per class.
        data: a file that replaces `train` of the TOML file; a built-in task ignores it until `splits`.

    Raises:
        FileNotFoundError: no such TOML file, folder or training file.
        ValueError: an unknown name, or a file that is not a task, naming the key.
    """
    if name.lower().endswith(".toml"):
        return load_table(Path(name), data)
    first, _, template = name.partition(":")
    if first in TASKS:
        return TASKS[first].using(template) if template else TASKS[first]
    if Path(name).expanduser().is_dir():
        return folder_task(Path(name))
    if Path(name).is_file():
        raise ValueError(f"{name} is not a task; describe it in a .toml file with at least train, template and label")
    if Path(name).is_absolute():
        raise FileNotFoundError(f"there is no folder {name}; give a folder of images, or the path of a .toml file")
    raise ValueError(
        f"unknown task {name!r}; {suggest(first, TASKS)} (or give the path of a .toml file, or of a folder of images)"
    )


def load_table(path: Path, data: str | None = None) -> Task:
    r"""Load a task from a TOML file; paths in it are relative to its folder.

        train = "train.csv"                   # CSV, TSV, JSON, JSONL or Parquet, also .gz, .bz2, .xz
        template = "Ticket: {text}\nQueue:"
        label = "queue"                       # or target = "summary", to generate
        [label_words]                         # optional: else each label in lower case
        BILLING = "billing"

    Also optional are name, description, dev and test (else split off train), group, question, max_input_tokens, metrics
    and split_seed. A chat task has `messages`, the column of conversations, instead of a template and a target, and may
    have `assistant_turns = "last"`. An image task has `image`, the column of paths, instead of a template, and may have
    `broken = "skip"`; its `train` is a table or a folder of class folders, or `hub` names a dataset instead.

    Raises:
        FileNotFoundError: no such TOML or training file.
        ValueError: a syntax error with its line, or a key that is unknown, missing, or not of its kind.
    """
    settings = _settings(path)
    where = path.resolve().parent
    files = {split: str(where / settings.pop(split)) for split in _SPLITS if split in settings}
    if data is not None:
        files["train"] = str(Path(data).resolve())
    if hub := settings.pop("hub", ""):
        files["train"], settings["source"] = hub, "hub"
    for key, table in (("train", files), ("image" if hub else "template", settings)):
        if key not in table and not (key == "template" and (settings.get("image") or settings.get("messages"))):
            raise ValueError(f'{path} has no {key!r}; add the line {key} = "..."')
    settings.setdefault("name", path.stem)
    if settings.get("image"):
        settings.setdefault("source", "images")
    writes = settings.get("target") or settings.get("messages")
    settings.setdefault("metrics", ["exact_match", "token_f1"] if writes else ["accuracy", "macro_f1"])
    if settings.get("label") and "label_words" not in settings and not settings.get("messages"):
        settings["label_words"] = _LABEL_WORDS.get(settings.get("source", ""), _table_words)(
            files["train"], settings["label"]
        )
    try:
        return Task.from_json({**settings, "files": files})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_files(task: Task, folder: Path | None) -> Mapping[str, Dataset]:
    """Read the rows of the task's files, by split."""
    check_no_folder(task, folder)
    return {split: task_rows(task, Path(file)) for split, file in task.files.items()}


READERS["files"] = read_files


_LABEL_WORDS = {"images": image_words, "hub": hub_words}
"""What finds the class names of a source of images."""


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of a task's .toml file")
    try:
        settings = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}; correct it there") from None
    for key, value in settings.items():
        if key not in _KEYS:
            raise ValueError(f"{path} has the unknown key {key!r}; {suggest(key, _KEYS)}")
        if type(value) is not _KEYS[key]:
            raise ValueError(f"{key} in {path} is {value!r}; write {_KINDS[_KEYS[key]]}")
    for label, word in settings.get("label_words", {}).items():
        if type(word) is not str:
            hint = (
                f"; move {label} above the line [label_words]" if label in _KEYS else "; write text in quotation marks"
            )
            if isinstance(word, dict):
                inner = next(iter(word), "")
                hint = f'; write a label with a dot in it in quotation marks, as "{label}.{inner}" = "..."'
            raise ValueError(f"the word for label {label!r} in {path} is {word!r}{hint}")
    for metric in settings.get("metrics", []):
        if type(metric) is not str:
            raise ValueError(f"metrics in {path} has {metric!r}; write a list of texts")
    return settings


def _table_words(file: str, label: str) -> dict[str, str]:
    """Each label's text in lower case; sorted, so that the order of the classes does not depend on that of the rows."""
    path = Path(file)
    rows = read_rows(path, [label], purpose=" for the label")
    labels = set()
    for number, value in enumerate(rows[label][:], start=1):
        text = label_texts(value, label, f"row {number} of {path}")[-1 if isinstance(value, float) else 0]
        if not text.strip():
            raise ValueError(
                f"row {number} of {path} has no label in column {label!r}; give it one or leave the row out"
            )
        labels.add(text)
    if len(labels) < 2:
        raise ValueError(f"all rows of {path} have the label {labels.pop()!r}; give rows of a second one")
    return {text: text.strip().lower() for text in sorted(labels)}
