"""The context of a distillation: a text, labelled rows as demonstrations, and what both are in tokens."""

import dataclasses
import random
from collections.abc import Hashable
from typing import Any

from softprompt.tasks.data.splits import Splits
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.task import Task

SEPARATOR = "\n\n"
"""Between two demonstrations, and between the context and a row."""
_TEXT = Task(name="context", template="{context}", target="answer", metrics=("exact_match",))
_NO_LIMIT = 1_000_000_000


def split_demonstrations(task: Task, rows: Splits, count: int, seed: int) -> Splits:
    """Take `count` labelled rows out of the training split: the result has them as the text `demonstrations`.

    A classification's classes take turns, so that their numbers differ by one at most where there are rows enough.

    Raises:
        ValueError: a task of images, or fewer than `count + 1` training rows: one has to be left to train on.
    """
    if task.image:
        raise ValueError(f"task {task.name!r} has images, and demonstrations are text; leave demonstrations out")
    if count >= len(rows.train):
        raise ValueError(
            f"demonstrations is {count}, and task {task.name!r} has {len(rows.train)} training rows, of which at least "
            "one has to be left to train on; lower it"
        )
    order = list(range(len(rows.train)))
    random.Random(f"demonstrations:{seed}").shuffle(order)
    by_class: dict[Hashable, list[int]] = {}
    for index in order:
        label = task.answer(rows.train[index]) if task.is_classification else ""
        by_class.setdefault(label, []).append(index)
    chosen: list[int] = []
    while len(chosen) < count:
        chosen += [indices.pop(0) for indices in by_class.values() if indices]
    chosen = chosen[:count]
    random.Random(f"order:{seed}").shuffle(chosen)  # or the last one would always be of the last class
    text = SEPARATOR.join(_demonstration(task, rows.train[index]) for index in chosen)
    train = rows.train.select([index for index in range(len(rows.train)) if index not in set(chosen)])
    return dataclasses.replace(rows, train=train, demonstrations=text)


def _demonstration(task: Task, row: dict[str, Any]) -> str:
    return task.render(row) + task.lead + task.golds(row)[0]


def encode_context(tokenizer: Any, text: str) -> tuple[tuple[int, ...], int]:
    """The context's tokens as those of a text before another one, and how many the tokenizer itself puts in front.

    The text is read as a user's: what looks like a control token in it is plain text.

    Raises:
        ValueError: a text without any token of its own.
    """
    [example] = encode(_TEXT, tokenizer, [{"context": text + SEPARATOR}], _NO_LIMIT, closing=False, answers=False)[0]
    [empty] = encode(_TEXT, tokenizer, [{"context": "x"}], _NO_LIMIT, closing=False, answers=False)[0]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    leading = next((at for at, token in enumerate(empty.input_ids) if token not in special), len(empty.input_ids))
    return example.input_ids, leading
