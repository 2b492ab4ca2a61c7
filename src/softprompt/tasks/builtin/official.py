"""Tasks of benchmarks: their official files, or the Hub's copy, as rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from softprompt.files import first_line
from softprompt.tasks.task import Task, Template, register

Row = Mapping[str, Any]
Rows = Iterator[dict[str, Any]]

TRAIN_AND_VALIDATION: Mapping[str, tuple[str, ...]] = {
    "train": ("train.jsonl",),
    "validation": ("val.jsonl", "validation.jsonl"),
}


def unchanged(row: Row) -> Rows:
    """Yield the row unchanged."""
    yield dict(row)


def read_table(path: Path) -> Iterable[Row]:
    """Read a table of any kind that `read_rows` knows, and raise as it does."""
    from softprompt.tasks.data.tabular import read_rows  # not earlier: listing tasks needs no datasets

    rows: Iterable[Row] = read_rows(path)
    return rows


@final
@dataclass(frozen=True, kw_only=True)
class Official:
    """Reads a task's labeled splits from the benchmark's folder, or without one from the Hub.

    Both give the same rows: `flatten` converts a file's rows to the Hub's columns, and `preprocess` converts those to
    the columns of the templates.
    """

    folder: str
    """The task's folder in the benchmark's, as published."""
    hub: str
    """The dataset on the Hub."""
    config: str
    """The task's configuration of that dataset."""
    labels: tuple[Any, ...] = ()
    """The files' labels for the Hub's 0, 1, ...; empty if the Hub's labels are not class indices."""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: TRAIN_AND_VALIDATION, hash=False)
    """The possible names of each split's file."""
    hub_splits: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The Hub's names of splits, where they differ."""
    read: Callable[[Path], Iterable[Row]] = read_table
    """Reads a file."""
    flatten: Callable[[Row], Rows] = unchanged
    """Converts a row of a file to rows with the Hub's columns."""
    preprocess: Callable[[Row], Rows] = unchanged
    """Converts a row with the Hub's columns to rows with the templates' columns."""

    def __call__(self, task: Task, folder: Path | None) -> Mapping[str, Any]:
        """Read the rows, by split.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ConnectionError: `folder` is None and the Hub is out of reach.
            ValueError: a row is not in the official format.
        """
        from datasets import Dataset

        splits = {}
        for split in self.files:
            if folder is None:
                rows, origin = self._from_hub(split), f"{self.hub} ({self.config}, {split})"
            else:
                file = self._file(folder, split)
                rows, origin = self._from_file(file), str(file)
            splits[split] = Dataset.from_list(list(self._preprocessed(rows, origin)))
        return splits

    def _file(self, folder: Path, split: str) -> Path:
        task_folder = folder / self.folder if (folder / self.folder).is_dir() else folder
        for name in self.files[split]:
            if (task_folder / name).is_file():
                return task_folder / name
        raise FileNotFoundError(
            f"{task_folder} has no {' or '.join(self.files[split])}; give the official folder that holds "
            f"{self.folder}, or {self.folder} itself"
        )

    def _from_file(self, file: Path) -> Iterator[Rows]:
        return (self.flatten(row) for row in self.read(file))

    def _from_hub(self, split: str) -> Iterator[Rows]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.hub, self.config, split=self.hub_splits.get(split, split))
        except (OSError, ValueError, RuntimeError) as error:
            reason = first_line(error)
            raise ConnectionError(
                f"the {split} rows of {self.config} cannot be loaded from the Hub's {self.hub} ({reason}); "
                f"give the official folder that holds {self.folder} as --data FOLDER"
            ) from None
        return (unchanged({**row, "label": self.labels[row["label"]]} if self.labels else row) for row in rows)

    def _preprocessed(self, rows: Iterator[Rows], origin: str) -> Rows:
        for number, flat_rows in enumerate(rows, start=1):
            try:
                for row in flat_rows:
                    yield from self.preprocess(row)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"row {number} of {origin} is not as {self.folder} was published ({reason}); give the official file"
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
        **settings,
    )
    return register(task, official)


def wordings(
    labels: Sequence[str],
    *,
    natural: tuple[str, Sequence[str]],
    dpt: str,
    residual: tuple[str, Sequence[str]],
    lm_eval: tuple[str, Sequence[str]] | None = None,
) -> Mapping[str, Template]:
    """The wordings of a classification: templates, each with a label word per label; `dpt` answers digits."""
    digits = [str(index) for index in range(len(labels))]
    texts = {"natural": natural, "dpt": (dpt, digits), "residual": residual}
    if lm_eval is not None:
        texts["lm-eval"] = lm_eval
    return {
        name: Template(text=text, label_words=dict(zip(labels, label_words, strict=True)))
        for name, (text, label_words) in texts.items()
    }
