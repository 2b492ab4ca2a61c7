"""A task's train, dev and test splits, and few-shot samples of them."""

import dataclasses
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast, final

from datasets import Dataset

from softprompt.tasks import user  # noqa: F401  (importing it registers the reader of the user's files)
from softprompt.tasks.data.images import image_table, split_folders, without_broken
from softprompt.tasks.data.row_contents import as_json, contents
from softprompt.tasks.data.row_warnings import Keys, equal_golds_warning, overlap_warning, row_keys
from softprompt.tasks.data.tabular import numbered, records, row_origin, task_rows
from softprompt.tasks.metrics import METRICS, check_installed
from softprompt.tasks.score import best_constant
from softprompt.tasks.task import READERS, Task, suggest
from softprompt.tasks.template import format_hint, value_text
from softprompt.types import Protocol

_Key = TypeVar("_Key", int, str)

DEV, TEST = 0.1, 0.2
"""The shares of rows for a dev or test split that the source does not have."""

SAME_ROWS = "selected and reported on the same rows"
"""The caveat of a score whose development and test rows are the same, as under the protocol `paper`."""


@final
@dataclass(frozen=True, kw_only=True)
class Splits:
    """Checked rows: every row renders and has an answer; `row_number` gives its number in its file."""

    train: Dataset
    """Empty, like `dev`, if the task can only be evaluated."""
    dev: Dataset
    """The rows that select the checkpoint."""
    test: Dataset
    """Held out, unless `shared` with dev."""
    fingerprint: str
    """sha256 of every column that the task reads, split by split."""
    full_fingerprint: str
    """The same before any rows were sampled (`shots`)."""
    test_fingerprint: str
    """The same of the test split alone."""
    majority: int | str
    """The best constant answer by the task's metric on the full training split, even if `train` is a sample of it; on
    the test split if there is no training split."""
    warnings: tuple[str, ...] = ()
    """Sentences about what works but looks wrong."""
    broken: tuple[str, ...] = ()
    """The unreadable images that were left out."""
    demonstrations: str = ""
    """Labeled rows removed from `train` as the context of a distillation, as text."""

    @property
    def shared(self) -> bool:
        """Whether dev and test are the same rows, as under the protocol `paper` or where both name one file."""
        return self.dev is self.test

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints as a run's record has them."""
        return {"splits": self.fingerprint, "full": self.full_fingerprint, "test": self.test_fingerprint}


def splits(task: Task, data: str | None = None, protocol: Protocol = "heldout") -> Splits:
    """Read the task's three splits; missing splits are cut from existing ones.

    A source of `rows` is split into 70, 10 and 20 %, a `validation` split is halved into dev and test (under the
    protocol `paper` it is both), and a missing dev or test is split off train: by whole groups, or whole questions, if
    the task has them, else class by class. The assignment follows the task's `split_seed` and no experiment's seed, so
    a prompt is never scored on rows that another run of the task was trained on. A source with only a test split can
    only be evaluated. Where the source's dev and test have the same rows, they are `shared`.

    Args:
        task: names the source and the seed of the split.
        data: a folder to read instead of the source, or a file whose rows replace the training split.
        protocol: how a validation split is used.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: a file or a row that cannot be used, naming the file, the row and the column; a dev or test split
            with the rows of the training split; or the protocol `paper` without a validation split.
        ModuleNotFoundError: a metric of the task needs an extra that is not installed.
    """
    check_installed((name, METRICS[name]) for name in task.metrics)
    parts, broken = _read(task, data)
    _compare_parts(task, parts)
    if "rows" in parts:
        parts = {**split_rows(task, parts.pop("rows"), {"dev": DEV, "test": TEST}, "train"), **parts}
    if parts.keys() == {"test"}:
        empty = parts["test"].select([])
        parts.update(train=empty, dev=empty)
    elif protocol == "paper":
        if "validation" not in parts:
            raise ValueError(
                f"task {task.name!r} has no official validation split, which the protocol paper selects and reports "
                "on; use heldout"
            )
        parts["dev"] = parts["test"] = parts["validation"]
    elif "validation" in parts:
        parts.update(split_rows(task, parts["validation"], {"dev": 0.5}, "test"))
    missing = {name: share for name, share in (("dev", DEV), ("test", TEST)) if name not in parts}
    if missing:
        parts.update(split_rows(task, parts["train"], missing, "train"))
    return _splits(task, parts["train"], parts["dev"], parts["test"], broken)


def load_test_split(task: Task, data: str, split: str | None = None) -> Splits | None:
    """Load all rows of a file as a test split; None if `data` is a benchmark's official folder.

    For an image task `data` may be a folder of class folders too. If it is a folder or a Hub dataset with splits, one
    of them is loaded: `split`, or `test`. The group column is not read, as nothing is split.

    Raises:
        FileNotFoundError: `data` does not exist.
        ValueError: `split` is given but `data` has no splits, or a row cannot be scored.
        ModuleNotFoundError: a metric of the task needs an extra that is not installed.
    """
    check_installed((name, METRICS[name]) for name in task.metrics)
    path = Path(data).expanduser()
    parts: Mapping[str, Path | Dataset] = {}
    if task.source == "hub" and not path.exists():
        parts = READERS["hub"](dataclasses.replace(task, files={"train": data}), None)
        parts = {"dev" if name == "validation" else name: rows for name, rows in parts.items()}
    elif not path.exists():
        folder = "" if task.files else ", or the task's official folder"
        raise FileNotFoundError(f"there is no {data}; give a file of rows to score{folder}")
    elif path.is_dir() and task.image:
        parts = split_folders(path)
    elif path.is_dir():
        if task.files:
            raise ValueError(f"{data} is a folder, but task {task.name!r} reads its rows from files; give one")
        return None
    if parts and (split or "test") not in parts:
        raise ValueError(f"{data} has no {split or 'test'} rows, only {', '.join(parts)}; name one of these as split")
    if not parts and split is not None:
        raise ValueError(f"split is {split!r}, but {data} has no splits and is scored whole; leave one of the two out")
    source = parts[split or "test"] if parts else path
    task = dataclasses.replace(task, group="")
    rows = _read_path(task, source) if isinstance(source, Path) else source
    check_rows(task, rows, data)
    rows = numbered(rows, data)
    broken: tuple[str, ...] = ()
    if task.image:
        rows, broken = without_broken(task, rows, data)
    empty = rows.select([])
    return _splits(task, empty, empty, rows, broken)


def _read(task: Task, data: str | None) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """The checked parts of the source, and unreadable images; the training split is from `data` if that is a file."""
    if task.source not in READERS:
        raise ValueError(f"unknown source {task.source!r} of task {task.name!r}; {suggest(task.source, READERS)}")
    if data is not None and task.files:
        task, data = dataclasses.replace(task, files={**task.files, "train": data}), None
    path = None if data is None else Path(data).expanduser()
    if path is not None and not path.exists():
        raise FileNotFoundError(f"there is no {data}; give a file of training rows, or the task's official folder")
    folder = path if path is not None and path.is_dir() else None
    parts = dict(READERS[task.source](task, folder))
    for name, rows in parts.items():
        origin = task.files.get(name, f"{name} of {task.name}")
        check_rows(task, rows, origin)
        parts[name] = numbered(rows, origin)
    if path is not None and folder is None:
        if parts.keys() == {"test"}:
            raise ValueError(f"task {task.name!r} has no training rows for {data} to replace; give the official folder")
        parts["train"] = _read_path(task, path)
        check_rows(task, parts["train"], str(data))
        parts["train"] = numbered(parts["train"], str(data))
    broken: tuple[str, ...] = ()
    for name in parts if task.image else ():
        parts[name], left_out = without_broken(task, parts[name], task.files.get(name, f"{name} of {task.name}"))
        broken += left_out
    return parts, broken


def _compare_parts(task: Task, parts: dict[str, Dataset]) -> None:
    """Make dev and test one table where they have the same rows, in any order.

    Raises:
        ValueError: dev or test has the rows of the training split.
    """
    for name in ("dev", "validation", "test"):
        if "train" in parts and name in parts and _have_equal_rows(task, parts["train"], parts[name]):
            raise ValueError(
                f"the {name} rows of task {task.name!r} ({row_origin(parts[name])}) are its training rows "
                f"({row_origin(parts['train'])}); give other rows, or leave {name} out so that it is split off train"
            )
    if "dev" in parts and "test" in parts and _have_equal_rows(task, parts["dev"], parts["test"]):
        parts["test"] = parts["dev"]


def _have_equal_rows(task: Task, rows: Dataset, others: Dataset) -> bool:
    """Whether two tables have the same rows, as far as the task reads them."""
    if len(rows) != len(others):
        return False
    tables = (records(table.select_columns(list(task.columns))) for table in (rows, others))
    first, second = (Counter(as_json(contents(task, row)) for row in table) for table in tables)
    return first == second


def _read_path(task: Task, path: Path) -> Dataset:
    return image_table(task, path) if task.image else task_rows(task, path)


def check_rows(task: Task, rows: Dataset, origin: str) -> None:
    """Check that every row renders and has an answer.

    Raises:
        ValueError: one does not, naming `origin`, the row (counted from 1) and the column.
    """
    if missing := [column for column in task.columns if column not in rows.column_names]:
        raise ValueError(
            f"{origin} has no column {missing[0]!r}, which task {task.name!r} reads; "
            f"it has {', '.join(map(repr, rows.column_names))}" + format_hint(missing[0], rows.column_names)
        )
    numeric = [name for name in task.metrics if METRICS[name].answer_kind == "numbers"]
    for number, row in enumerate(records(rows), start=1):
        where = f"row {number} of {origin}"
        task.check_input(row, where)
        task.answer(row, where)
        if numeric and not _is_number(gold := task.golds(row, where)[0]):
            raise ValueError(
                f"{where} has {gold!r} in column {task.target or task.messages!r}, but {', '.join(numeric)} of task "
                f"{task.name!r} needs a number; write one or leave the row out"
            )
        for column in (task.group, task.question):
            if column and not value_text(row[column], column, where).strip():
                raise ValueError(f"{where} has no value in column {column!r}; give it one")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def split_rows(task: Task, rows: Dataset, shares: Mapping[str, float], rest: str) -> dict[str, Dataset]:
    """Split rows into parts of about these shares, and the part `rest`; rows keep their order.

    With a group or a question column, its values are assigned as units; else every class is split by the same shares.
    The assignment follows sha256 of the task's `split_seed` and the unit's name or the row's index, so it is the same
    on every machine and version.

    Raises:
        ValueError: so few rows, groups or questions that a part would be empty.
    """
    parts = _by_unit(task, rows, shares) if task.split_unit else _by_class(task, rows, shares)
    assigned = {index for indices in parts.values() for index in indices}
    parts[rest] = [index for index in range(len(rows)) if index not in assigned]
    if empty := [name for name, indices in parts.items() if not indices]:
        kind = "groups" if task.group else "questions" if task.question else "rows"
        count = f"{len(set(rows[task.split_unit][:])) if task.split_unit else len(rows)} {kind}"
        raise ValueError(
            f"{count} of task {task.name!r} are too few to split into {', '.join(parts)}: {empty[0]} would be empty; "
            "give more rows, or a file for each split"
        )
    return {name: rows.select(sorted(indices)) for name, indices in parts.items()}


def shots(task: Task, full: Splits, k: int, seed: int, balanced: bool = True) -> Splits:
    """Few-shot splits: `k` training rows and as many other rows for dev; the test split is unchanged.

    Both are drawn from the training split: `k` of each class, or `k` in all if not `balanced`. No group (without one,
    no question) is in both. If dev and test are `shared` they stay so, and only the training rows are drawn.

    Raises:
        ValueError: `k` is below 1, or there are fewer rows than needed.
    """
    if k < 1:
        raise ValueError(f"the number of shots is {k}; it must be at least 1")
    answers = [task.answer(row) for row in records(full.train)]
    units = list(map(str, full.train[task.split_unit][:] if task.split_unit else range(len(answers))))
    classes: Sequence[Hashable] = answers if balanced and task.is_classification else [""] * len(answers)

    def draw(candidates: Iterable[int], split: str) -> list[int]:
        drawn: dict[Hashable, list[int]] = {label: [] for label in classes}
        for index in candidates:
            if len(drawn[classes[index]]) < k:
                drawn[classes[index]].append(index)
        for label, indices in drawn.items():
            if len(indices) < k:
                of_class = f" of class {list(task.label_words)[label]!r}" if isinstance(label, int) else ""
                raise ValueError(
                    f"{k} shots of task {task.name!r} need more rows{of_class}: {len(indices)} are left for {split}; "
                    "lower the number of shots"
                )
        return sorted(index for indices in drawn.values() for index in indices)

    unchanged = full.broken, full.full_fingerprint, full.majority
    order = _order(range(len(answers)), seed)
    train = draw(order, "train")
    if full.shared:
        return _splits(task, full.train.select(train), full.dev, full.test, *unchanged)
    used = {units[index] for index in train}
    dev = draw([index for index in order if units[index] not in used], "dev")
    return _splits(task, full.train.select(train), full.train.select(dev), full.test, *unchanged)


def _splits(
    task: Task,
    train: Dataset,
    dev: Dataset,
    test: Dataset,
    broken: tuple[str, ...],
    full_fingerprint: str = "",
    majority: int | str | None = None,
) -> Splits:
    """Compute the fingerprints and warnings of splits, and their majority; of a sample, some are those of all rows."""
    labeled = train if len(train) else test
    golds = [task.answer(row) if task.is_classification else task.golds(row) for row in records(labeled)]
    counts = Counter(golds)
    questions = labeled[task.question][:] if task.question else None
    texts, digests = set[str](), dict[str, str]()
    keys: dict[str, list[Keys]] = {}
    for name, rows in (("train", train), ("dev", dev), ("test", test)):
        digest, keys[name] = hashlib.sha256(), []
        for row in records(rows.select_columns(list(task.columns))):
            read = contents(task, row)
            digest.update(as_json(read) + b"\n")
            keys[name].append(row_keys(task, read))
            if not task.is_classification:
                texts.add(task.golds(row)[0])
        digests[name] = digest.hexdigest()
    fingerprint = hashlib.sha256(as_json(digests)).hexdigest()
    if task.is_classification and len(train) and len(counts) < 2:
        only = list(task.label_words)[cast(int, next(iter(counts)))]
        raise ValueError(
            f"all {len(train)} training rows of task {task.name!r} have the label {only!r}; add rows of a second one"
        )
    held_out = {"test": keys["test"]} if dev is test else {"test": keys["test"], "dev": keys["dev"]}
    of_rows = (overlap_warning(task, keys["train"], held_out), equal_golds_warning(task, texts))
    unused = [label for index, label in enumerate(task.label_words) if len(train) and index not in counts]
    return Splits(
        train=train,
        dev=dev,
        test=test,
        fingerprint=fingerprint,
        full_fingerprint=full_fingerprint or fingerprint,
        test_fingerprint=digests["test"],
        majority=best_constant(task, golds, questions) if majority is None else majority,
        warnings=(
            *(f"no training row of task {task.name!r} has the label {label!r}" for label in unused),
            *((f"{len(broken)} broken images were left out: {', '.join(broken)}",) if broken else ()),
            *(warning for warning in of_rows if warning),
        ),
        broken=broken,
    )


def _by_unit(task: Task, rows: Dataset, shares: Mapping[str, float]) -> dict[str, list[int]]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(rows[task.split_unit][:]):
        members[str(value)].append(index)
    order = iter(_order(members, task.split_seed))
    parts: dict[str, list[int]] = {}
    for name, share in shares.items():
        parts[name] = []
        while len(parts[name]) < share * len(rows) and (unit := next(order, None)) is not None:
            parts[name] += members[unit]
    return parts


def _by_class(task: Task, rows: Dataset, shares: Mapping[str, float]) -> dict[str, list[int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    classes = [task.answer(row) if task.is_classification else "" for row in records(rows)]
    for index in _order(range(len(rows)), task.split_seed):
        members[classes[index]].append(index)
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for indices in members.values():
        start, end = 0, 0.0
        for name, share in shares.items():
            end += share * len(indices)
            parts[name] += indices[start : round(end)]
            start = round(end)
    return parts


def _order(keys: Iterable[_Key], seed: int) -> list[_Key]:
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
