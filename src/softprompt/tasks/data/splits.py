"""A task's rows in three splits, and few-shot draws of them."""

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, final

from datasets import Dataset

from softprompt.backbones import image_processor
from softprompt.tasks.data.images import cut_folders, pictures, without_broken
from softprompt.tasks.data.tabular import numbered, records, task_rows
from softprompt.tasks.metrics import METRICS
from softprompt.tasks.score import best_constant
from softprompt.tasks.task import READERS, Task, suggest
from softprompt.tasks.template import format_hint, value_text
from softprompt.types import Protocol

_Key = TypeVar("_Key", int, str)

DEV, TEST = 0.1, 0.2
"""The shares that are cut for a split that a source has not."""


SAME_ROWS = "selected and reported on the same rows"
"""What has to be said beside a score under the protocol `paper`."""


@final
@dataclass(frozen=True, kw_only=True)
class Splits:
    """Checked rows: every one renders, and has an answer; `row_number` tells where in its file it was."""

    train: Dataset
    """Empty, like `dev`, where the task can only be scored."""
    dev: Dataset
    """Selects the checkpoint."""
    test: Dataset
    """Held out, unless the two are `shared`."""
    fingerprint: str
    """sha256 over what the task reads of every row, split by split."""
    majority: int | str
    """The answer that scores best if it is always given, by the task's metric on the whole training split, whatever a
    few-shot draw has of each; on the test split where there is no other."""
    warnings: tuple[str, ...] = ()
    """What works but looks wrong, a sentence each."""
    broken: tuple[str, ...] = ()
    """The images that cannot be read and were left out."""
    demonstrations: str = ""
    """Labelled rows taken out of `train` to be the context of a distillation, as text."""

    @property
    def shared(self) -> bool:
        """Whether one set of rows both selects and reports, as under the protocol `paper`."""
        return self.dev is self.test


def splits(task: Task, data: str | None = None, seed: int = 0, protocol: Protocol = "heldout") -> Splits:
    """The task's three splits; what the source has not is cut from what it has.

    A source of `rows` is cut into 70, 10 and 20 %, a `validation` split is halved into dev and test (under the protocol
    `paper` it is both of them), and a missing dev or test is cut from train: by group where the task has one, else
    class by class. A source with a test split alone is only scored.

    Args:
        task: says the source, and may fix the seed by its `split_seed`.
        data: a folder to read in place of the source, or a file whose rows take the place of the training split.
        seed: of the cut, where the task does not fix it.
        protocol: what a validation split is for.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file or a row that cannot be used, naming the file, the row and the column; or the protocol
            `paper` where there is no validation split.
    """
    found, broken = _read(task, data)
    seed = seed if task.split_seed is None else task.split_seed
    if "rows" in found:
        found = {**cut(task, found.pop("rows"), {"dev": DEV, "test": TEST}, "train", seed), **found}
    if found.keys() == {"test"}:
        nothing = found["test"].select([])
        found.update(train=nothing, dev=nothing)
    elif protocol == "paper":
        if "validation" not in found:
            raise ValueError(
                f"task {task.name!r} has no official validation split, which the protocol paper selects and reports "
                "on; use heldout"
            )
        found["dev"] = found["test"] = found["validation"]
    elif "validation" in found:
        found.update(cut(task, found["validation"], {"dev": 0.5}, "test", seed))
    wanted = {name: share for name, share in (("dev", DEV), ("test", TEST)) if name not in found}
    if wanted:
        found.update(cut(task, found["train"], wanted, "train", seed))
    return _splits(task, found["train"], found["dev"], found["test"], broken)


def given_rows(task: Task, data: str, split: str | None = None) -> Splits | None:
    """All rows of a file that is given to be scored, as the test split; none: it is the official folder of a benchmark.

    Of a task of images it may be a folder of class folders too. Where a folder or a hub dataset is cut already, it is
    that split of it, `test` if none is named. The column of groups is not needed: nothing is cut.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: a split is named and the rows have none, or a row cannot be scored.
    """
    place = Path(data).expanduser()
    parts: Mapping[str, Path | Dataset] = {}
    if task.source == "hub" and not place.exists():
        parts = READERS["hub"](dataclasses.replace(task, files={"train": data}), None)
        parts = {"dev" if name == "validation" else name: rows for name, rows in parts.items()}
    elif not place.exists():
        folder = "" if task.files else ", or the task's official folder"
        raise FileNotFoundError(f"there is no {data}; give a file of rows to score{folder}")
    elif place.is_dir() and task.image:
        parts = cut_folders(place)
    elif place.is_dir():
        if task.files:
            raise ValueError(f"{data} is a folder, and task {task.name!r} has its rows in files; give one")
        return None
    if parts and (split or "test") not in parts:
        raise ValueError(f"{data} has no {split or 'test'} rows, it has {', '.join(parts)}; name one of these as split")
    if not parts and split is not None:
        raise ValueError(f"split is {split!r}, and {data} is scored whole, with no splits; leave one of the two out")
    found = parts[split or "test"] if parts else place
    task = dataclasses.replace(task, group="")
    if isinstance(found, Path):
        found = pictures(task, found) if task.image else task_rows(task, found)
    check(task, found, data)
    found = numbered(found, data)
    broken: tuple[str, ...] = ()
    if task.image:
        found, broken = without_broken(task, found, data)
    nothing = found.select([])
    return _splits(task, nothing, nothing, found, broken)


def _read(task: Task, data: str | None) -> tuple[dict[str, Dataset], tuple[str, ...]]:
    """What the source has, checked, and broken images; with the training split from `data` where that is a file."""
    if task.source not in READERS:
        raise ValueError(f"unknown source {task.source!r} of task {task.name!r}; {suggest(task.source, READERS)}")
    if data is not None and task.files:
        task, data = dataclasses.replace(task, files={**task.files, "train": data}), None
    given = None if data is None else Path(data).expanduser()
    if given is not None and not given.exists():
        raise FileNotFoundError(f"there is no {data}; give a file of training rows, or the task's official folder")
    folder = given if given is not None and given.is_dir() else None
    found = dict(READERS[task.source](task, folder))
    for name, rows in found.items():
        origin = task.files.get(name, f"{name} of {task.name}")
        check(task, rows, origin)
        found[name] = numbered(rows, origin)
    if given is not None and folder is None:
        if found.keys() == {"test"}:
            raise ValueError(f"task {task.name!r} has no training rows for {data} to replace; give the official folder")
        found["train"] = pictures(task, given) if task.image else task_rows(task, given)
        check(task, found["train"], str(data))
        found["train"] = numbered(found["train"], str(data))
    broken: tuple[str, ...] = ()
    for name in found if task.image else ():
        found[name], left_out = without_broken(task, found[name], task.files.get(name, f"{name} of {task.name}"))
        broken += left_out
    return found, broken


def check(task: Task, rows: Dataset, origin: str) -> None:
    """Refuse rows that do not render or have no answer.

    Raises:
        ValueError: naming `origin`, the row (counted from 1) and the column.
    """
    if missing := [column for column in task.columns if column not in rows.column_names]:
        raise ValueError(
            f"{origin} has no column {missing[0]!r}, which task {task.name!r} reads; "
            f"it has {', '.join(map(repr, rows.column_names))}" + format_hint(missing[0], rows.column_names)
        )
    numeric = [name for name in task.metrics if METRICS[name].of == "numbers"]
    for number, row in enumerate(records(rows), start=1):
        where = f"row {number} of {origin}"
        if not any(text.strip() for is_field, text in task.pieces(row, where) if is_field):
            raise ValueError(f"{where} has nothing in any column of the template; take it out")
        task.answer(row, where)
        if numeric and not _is_number(gold := task.golds(row, where)[0]):
            raise ValueError(
                f"{where} has {gold!r} in column {task.target!r}, and {', '.join(numeric)} of task {task.name!r} "
                "needs a number; write one or leave the row out"
            )
        for column in (task.group, task.question):
            if column and not value_text(row[column], column, where).strip():
                raise ValueError(f"{where} has no value in column {column!r}; give it one")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def cut(task: Task, rows: Dataset, shares: Mapping[str, float], rest: str, seed: int) -> dict[str, Dataset]:
    """Disjoint parts of about these shares, and the rest; rows keep their order.

    With a group column whole groups are dealt out; else every class is cut by the same shares. The deal follows
    sha256 of the seed and the group's name or the row's place, so it is the same on every machine and version.

    Raises:
        ValueError: so few rows or groups that a part would be empty.
    """
    dealt = _by_group(task, rows, shares, seed) if task.group else _by_class(task, rows, shares, seed)
    taken = {index for indices in dealt.values() for index in indices}
    dealt[rest] = [index for index in range(len(rows)) if index not in taken]
    if empty := [name for name, indices in dealt.items() if not indices]:
        what = f"{len(set(rows[task.group][:]))} groups" if task.group else f"{len(rows)} rows"
        raise ValueError(
            f"{what} of task {task.name!r} are too few to cut {', '.join(dealt)} from: {empty[0]} would be empty; "
            "give more rows, or a file for each split"
        )
    return {name: rows.select(sorted(indices)) for name, indices in dealt.items()}


def shots(task: Task, whole: Splits, k: int, seed: int, balanced: bool = True) -> Splits:
    """Few-shot: `k` training rows and as many other ones for development; the test split stays.

    Both are drawn from the training split, `k` of each class or, not balanced, `k` in all as they come. Where the task
    has groups, none is in both. Where dev and test are `shared` they stay so, and only the training rows are drawn.

    Raises:
        ValueError: `k` below 1, or fewer rows than the two draws need.
    """
    if k < 1:
        raise ValueError(f"the number of shots is {k}; it must be at least 1")
    answers = [task.answer(row) for row in records(whole.train)]
    groups = list(map(str, whole.train[task.group][:] if task.group else range(len(answers))))
    classes: Sequence[Hashable] = answers if balanced and task.is_classification else [""] * len(answers)

    def draw(candidates: Iterable[int], what: str) -> list[int]:
        drawn: dict[Hashable, list[int]] = {one: [] for one in classes}
        for index in candidates:
            if len(drawn[classes[index]]) < k:
                drawn[classes[index]].append(index)
        for one, indices in drawn.items():
            if len(indices) < k:
                which = f" of class {list(task.label_words)[one]!r}" if isinstance(one, int) else ""
                raise ValueError(
                    f"{k} shots of task {task.name!r} need more rows{which}: {len(indices)} are left for {what}; "
                    "lower the number of shots"
                )
        return sorted(index for indices in drawn.values() for index in indices)

    order = _order(range(len(answers)), seed)
    train = draw(order, "train")
    if whole.shared:
        return _splits(task, whole.train.select(train), whole.dev, whole.test, whole.broken, whole.majority)
    used = {groups[index] for index in train}
    dev = draw([index for index in order if groups[index] not in used], "dev")
    return _splits(task, whole.train.select(train), whole.train.select(dev), whole.test, whole.broken, whole.majority)


def _splits(
    task: Task,
    train: Dataset,
    dev: Dataset,
    test: Dataset,
    broken: tuple[str, ...],
    majority: int | str | None = None,
) -> Splits:
    """The splits; `majority` is given where `train` is a draw of the split that says it."""
    known = train if len(train) else test
    golds = [task.answer(row) for row in records(known)]
    counts = Counter(golds)
    questions = known[task.question][:] if task.question else None
    digest = hashlib.sha256()
    for name, rows in (("train", train), ("dev", dev), ("test", test)):
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in records(rows.select_columns(list(task.columns))):
            # What is in an image's file counts, and not where it lies.
            read = {**row, task.image: image_processor.digest(row[task.image])} if task.image else row
            digest.update(json.dumps(read, sort_keys=True, default=str).encode() + b"\n")
    if task.is_classification and len(train) and len(counts) < 2:
        only = list(task.label_words)[int(next(iter(counts)))]
        raise ValueError(
            f"all {len(train)} training rows of task {task.name!r} have the label {only!r}; "
            "there is nothing to tell apart, give rows of a second one"
        )
    unused = [label for index, label in enumerate(task.label_words) if len(train) and index not in counts]
    return Splits(
        train=train,
        dev=dev,
        test=test,
        fingerprint=digest.hexdigest(),
        majority=best_constant(task, golds, questions) if majority is None else majority,
        warnings=(
            *(f"no training row of task {task.name!r} has the label {label!r}" for label in unused),
            *((f"{len(broken)} broken images were left out: {', '.join(broken)}",) if broken else ()),
        ),
        broken=broken,
    )


def _by_group(task: Task, rows: Dataset, shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, value in enumerate(rows[task.group][:]):
        members[str(value)].append(index)
    order = iter(_order(members, seed))
    dealt: dict[str, list[int]] = {}
    for name, share in shares.items():
        dealt[name] = []
        while len(dealt[name]) < share * len(rows) and (group := next(order, None)) is not None:
            dealt[name] += members[group]
    return dealt


def _by_class(task: Task, rows: Dataset, shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    classes = [task.answer(row) if task.is_classification else "" for row in records(rows)]
    for index in _order(range(len(rows)), seed):
        members[classes[index]].append(index)
    dealt: dict[str, list[int]] = {name: [] for name in shares}
    for indices in members.values():
        start, end = 0, 0.0
        for name, share in shares.items():
            end += share * len(indices)
            dealt[name] += indices[start : round(end)]
            start = round(end)
    return dealt


def _order(keys: Iterable[_Key], seed: int) -> list[_Key]:
    return sorted(keys, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
