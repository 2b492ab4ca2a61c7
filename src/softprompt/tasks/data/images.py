"""Image tasks: rows from a folder of class folders, a table of paths, or a Hub dataset."""

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones import image_processor
from softprompt.backbones.image_processor import Processor
from softprompt.files import error_text
from softprompt.tasks.data.examples import Example, Examples
from softprompt.tasks.data.tabular import read_rows, task_rows
from softprompt.tasks.data.tokenize import encode_pictures
from softprompt.tasks.task import READERS, Task, check_no_folder
from softprompt.tasks.template import label_texts
from softprompt.types import Augment

IMAGE, LABEL = "image", "label"
"""The columns of rows that are read from a folder."""
_SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""The split that each name of a folder or of a Hub split means."""


def folder_task(folder: Path) -> Task:
    """Make a task of a folder of class folders, or of a folder of `train` (and `val`, `test`) folders of such.

    Raises:
        ValueError: there are fewer than two class folders.
    """
    folder = folder.expanduser().resolve()
    return Task(
        name=folder.name,
        image=IMAGE,
        label=LABEL,
        label_words=_label_words(split_folders(folder).get("train", folder), None),
        metrics=("accuracy", "macro_f1"),
        source="images",
        files={"train": str(folder)},
    )


def image_words(train: str, label: str) -> dict[str, str]:
    """Label words equal to the class names, sorted: of the training folder, or the training table's labels."""
    path = Path(train)
    return _label_words(split_folders(path).get("train", path), label)


def hub_words(repository: str, label: str) -> dict[str, str]:
    """Label words equal to the class names of a Hub dataset, in the order of its `ClassLabel` if it has one."""
    splits = _load_hub(repository)
    column = splits[next(iter(splits))].features.get(label)
    if isinstance(column, datasets.ClassLabel):
        return {word: word for word in column.names}
    return {str(word): str(word) for word in sorted({value for rows in splits.values() for value in rows[label]})}


def image_table(task: Task, path: Path) -> Dataset:
    """Read the rows of a folder of class folders, or of a table whose image column has paths relative to its folder.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: no class folders, an empty one, or a table that cannot be read.
    """
    if not path.is_dir():
        return _with_full_paths(task, task_rows(task, path), path)
    rows = [(str(file), folder.name) for folder in _class_folders(path) for file in _files(folder)]
    if empty := [folder.name for folder in _class_folders(path) if not _files(folder)]:
        raise ValueError(f"the class folder {empty[0]!r} of {path} has no files; fill it or remove it")
    return Dataset.from_dict({task.image: [file for file, _ in rows], task.label: [label for _, label in rows]})


def unlabeled_images(task: Task, path: Path) -> list[dict[str, Any]]:
    """The rows to predict: one image, every file in a folder, or a table's rows.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: a folder without files, or a table that cannot be read.
    """
    if path.is_dir():
        if not (files := _files(path)):
            raise ValueError(f"the folder {path} has no files; give one with images")
        return [{task.image: str(file)} for file in files]
    if path.suffix.lower() in _extensions() and path.is_file():
        return [{task.image: str(path)}]
    return list(_with_full_paths(task, task_rows(task, path, answers=False), path))


def _with_full_paths(task: Task, rows: Dataset, table: Path) -> Dataset:
    """A table's rows with the images' paths, which are relative to the table's folder, prefixed with that folder."""
    if task.image not in rows.column_names:
        return rows  # `check_rows` reports the missing column
    paths = [str(table.parent / cell) if isinstance(cell, str) and cell else cell for cell in rows[task.image]]
    return Dataset.from_dict({name: paths if name == task.image else rows[name] for name in rows.column_names})


def without_broken(task: Task, rows: Dataset, origin: str) -> tuple[Dataset, tuple[str, ...]]:
    """Split off rows with unreadable images: returns the readable rows and the names of the unreadable images.

    Raises:
        FileNotFoundError, ValueError: an image cannot be read and the task has `broken="refuse"`, or none can be read.
    """
    readable, broken = [], []
    for number, cell in enumerate(rows[task.image]):
        try:
            image_processor.read(cell, f"row {number + 1} of {origin}", rough=True)
        except (FileNotFoundError, ValueError):
            if task.broken == "refuse":
                raise
            broken.append(image_processor.name(cell))
        else:
            readable.append(number)
    if len(rows) and not readable:
        raise ValueError(f"none of the {len(rows)} images of {origin} can be read; the first is {broken[0]!r}")
    return (rows.select(readable) if broken else rows), tuple(broken)


def with_augmentation(examples: Sequence[Example], augment: Augment) -> Sequence[Example]:
    """The examples with images augmented at random each time they are batched; text is unchanged."""
    if isinstance(examples, Examples):
        return examples
    return [
        dataclasses.replace(example, picture=example.picture.augmented(augment)) if example.picture else example
        for example in examples
    ]


def sample_pixels(
    task: Task, processor: Processor, rows: Dataset, size: int, seed: int, count: int = 100
) -> Float[Tensor, "image channel height width"]:
    """The pixels of `count` rows sampled by `seed`, or of all rows if there are fewer."""
    indices = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    examples = encode_pictures(task, processor, rows.select(indices), size, answers=False)
    return torch.stack([example.picture.pixels() for example in examples if example.picture is not None])


def _read_files(task: Task, folder: Path | None) -> Mapping[str, Dataset]:
    check_no_folder(task, folder)
    parts: dict[str, Dataset] = {}
    for split, file in task.files.items():
        paths = split_folders(Path(file)) or {split: Path(file)}
        parts.update({name: image_table(task, path) for name, path in paths.items()})
    return _dev_as_validation(parts)


def _read_hub(task: Task, folder: Path | None) -> Mapping[str, Dataset]:
    check_no_folder(task, folder)
    repository, parts = task.files["train"], {}
    splits = _load_hub(repository)
    for part, split in _by_split(splits, repository).items():
        rows = splits[split]
        for column in (task.image, task.label):
            if column not in rows.column_names:
                raise ValueError(f"{repository} has no column {column!r}; it has {rows.column_names}")
        if part != "test" or not _is_unlabeled(rows, task.label):
            parts[part] = _undecoded(task, rows, f"split {split} of {repository}")
    if "train" not in parts:
        raise ValueError(f"{repository} has no split named train; choose another dataset")
    return _dev_as_validation(parts)


def _is_unlabeled(rows: Dataset, label: str) -> bool:
    """Whether the labels are withheld, as in the test rows of benchmarks: `datasets` then has -1."""
    return isinstance(rows.features[label], datasets.ClassLabel) and set(rows[label][:]) <= {-1}


def _dev_as_validation(parts: dict[str, Dataset]) -> dict[str, Dataset]:
    """Dev rows without test rows are an official validation split, which `splits` halves."""
    if "test" not in parts and "dev" in parts:
        parts["validation"] = parts.pop("dev")
    return parts


def _undecoded(task: Task, rows: Dataset, where: str) -> Dataset:
    """Only the image, as bytes, and the label, as its name."""
    label, values = rows.features[task.label], rows[task.label][:]
    has_names = isinstance(label, datasets.ClassLabel)
    if has_names and -1 in values:
        raise ValueError(f"row {values.index(-1) + 1} of {where} has no label; choose a dataset whose rows have one")
    images = rows.select_columns([task.image])
    if isinstance(rows.features[task.image], datasets.Image):
        images = images.cast_column(task.image, datasets.Image(decode=False))
    return images.add_column(task.label, [label.int2str(value) if has_names else str(value) for value in values])


def _load_hub(repository: str) -> Mapping[str, Dataset]:
    try:
        splits: Mapping[str, Dataset] = datasets.load_dataset(repository)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the dataset {repository!r} cannot be loaded ({error_text(error)}); check the name, or fetch it first"
        ) from error
    return splits


def split_folders(folder: Path) -> dict[str, Path]:
    """The `train`, `val` and `test` folders in `folder`, by split; empty if it has no `train`."""
    if not (folder / "train").is_dir():
        return {}
    subfolders = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    return {split: subfolders[name] for split, name in _by_split(subfolders, str(folder)).items()}


def _by_split(names: Iterable[str], where: str) -> dict[str, str]:
    """The name of each split among `names`; the other names are ignored."""
    by_split: dict[str, str] = {}
    for name in names:
        if name in _SPLITS and (other := by_split.setdefault(_SPLITS[name], name)) != name:
            raise ValueError(f"{where} has both {other!r} and {name!r}, which mean the same; remove one of them")
    return by_split


def _label_words(path: Path, label: str | None) -> dict[str, str]:
    if path.is_dir():
        names = [folder.name for folder in _class_folders(path)]
    else:
        rows = read_rows(path, [str(label)], purpose=" for the label")
        values = enumerate(rows[str(label)][:], start=1)
        names = sorted({label_texts(value, str(label), f"row {n} of {path}")[0] for n, value in values} - {""})
    if len(names) < 2:
        raise ValueError(f"{path} has {len(names)} classes ({', '.join(names)}); there must be two or more")
    return {name: name.strip() for name in names}


def _class_folders(folder: Path) -> list[Path]:
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{folder} has no folders; give each class a folder with its images")
    return folders


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` except hidden ones; a file that is not an image counts as broken."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _extensions() -> set[str]:
    from PIL import Image

    return set(Image.registered_extensions())


READERS["images"] = _read_files
READERS["hub"] = _read_hub
