"""A benchmark's official files, or the hub's copy of them, as the rows of its tasks."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from datasets import Dataset, load_dataset

from softprompt.tasks.data.tabular import read_rows
from softprompt.tasks.task import Task, Template, register

Row = Mapping[str, Any]
Rows = Iterator[dict[str, Any]]

TRAIN_AND_VALIDATION: Mapping[str, tuple[str, ...]] = {
    "train": ("train.jsonl",),
    "validation": ("val.jsonl", "validation.jsonl"),
}


def as_it_is(row: Row) -> Rows:
    """The row."""
    yield dict(row)


@final
@dataclass(frozen=True, kw_only=True)
class Official:
    """Reads a task's labelled splits: from the benchmark's folder where one is given, else from the hub.

    Files and hub come to the same rows: a file's rows are flattened to the hub's columns, and `prepare` makes the
    columns of the templates from those.
    """

    folder: str
    """The task's folder within the benchmark's, as published."""
    hub: str
    """The hub's dataset."""
    config: str
    """The task's name within it."""
    labels: tuple[Any, ...] = ()
    """What the files say for the hub's labels 0, 1, ...; empty: the hub has no classes here."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TRAIN_AND_VALIDATION, hash=False)
    """Each split's file, under every name it goes by."""
    hub_splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The hub's names of splits where they differ."""
    read: Callable[[Path], Iterable[Row]] = read_rows
    """The rows of a file."""
    flatten: Callable[[Row], Rows] = as_it_is
    """Rows in the hub's columns from one of a file."""
    prepare: Callable[[Row], Rows] = as_it_is
    """Rows in the templates' columns from one in the hub's, or none."""

    def __call__(self, task: Task, folder: Path | None) -> Mapping[str, Dataset]:
        """The rows by split.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ConnectionError: no folder is given, and the hub is out of reach.
            ValueError: a row is not in the official format.
        """
        found = {}
        for split in self.files:
            if folder is None:
                rows, origin = self._from_hub(split), f"{self.hub} ({self.config}, {split})"
            else:
                file = self._file(folder, split)
                rows, origin = self._from_file(file), str(file)
            found[split] = Dataset.from_list(list(self._prepared(rows, origin)))
        return found

    def _file(self, folder: Path, split: str) -> Path:
        place = folder / self.folder if (folder / self.folder).is_dir() else folder
        for name in self.files[split]:
            if (place / name).is_file():
                return place / name
        raise FileNotFoundError(
            f"{place} has no {' or '.join(self.files[split])}; give the official folder that holds {self.folder}, "
            f"or {self.folder} itself"
        )

    def _from_file(self, file: Path) -> Iterator[Rows]:
        return (self.flatten(row) for row in self.read(file))

    def _from_hub(self, split: str) -> Iterator[Rows]:
        try:
            rows = load_dataset(self.hub, self.config, split=self.hub_splits.get(split, split))
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConnectionError(
                f"the {split} rows of {self.config} cannot be had from the hub's {self.hub} ({reason}); "
                f"give the official folder that holds {self.folder} as --data FOLDER"
            ) from None
        return (as_it_is({**row, "label": self.labels[row["label"]]} if self.labels else row) for row in rows)

    def _prepared(self, rows: Iterator[Rows], origin: str) -> Rows:
        for number, flat in enumerate(rows, start=1):
            try:
                for row in flat:
                    yield from self.prepare(row)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"row {number} of {origin} is not as {self.folder} was published ({what}); give the official file"
                ) from None


def register_official(
    name: str, official: Official, description: str, templates: Mapping[str, Template], **settings: Any
) -> Task:
    """Register a task with fixed splits whose default wording is its template `natural`."""
    natural = templates["natural"]
    task = Task(
        name=name,
        description=description,
        template=natural.text,
        label_words=natural.label_words,
        templates=templates,
        source=name,
        split_seed=0,
        **settings,
    )
    return register(task, official)
