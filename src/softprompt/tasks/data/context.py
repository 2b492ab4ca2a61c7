"""The context of a distillation: labeled rows as demonstrations, and the tokens of a context."""

import dataclasses
import random
from collections.abc import Hashable
from typing import Any

from softprompt.tasks.data.splits import Splits
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.task import Task

SEPARATOR = "\n\n"
"""The text between two demonstrations, and between the context and a row."""
_TEXT = Task(name="context", template="{context}", target="answer", metrics=("exact_match",))
_NO_LIMIT = 1_000_000_000


def split_demonstrations(task: Task, rows: Splits, count: int, seed: int) -> Splits:
    """Move `count` labeled rows from the training split to the text `demonstrations` of the result.

    Classes alternate, so their counts differ by at most one if each has enough rows.

    Raises:
        ValueError: an image or a chat task, or fewer than `count + 1` training rows, as one must be left to train on.
    """
    if task.image:
        raise ValueError(f"task {task.name!r} has images, but demonstrations are text; leave demonstrations out")
    if task.messages:
        raise ValueError(
            f"task {task.name!r} has chat messages, but demonstrations are rows of a template; leave demonstrations "
            "out, or write them into a context"
        )
    if count >= len(rows.train):
        raise ValueError(
            f"demonstrations is {count}, but task {task.name!r} has {len(rows.train)} training rows, of which at least "
            "one must be left to train on; lower it"
        )
    order = list(range(len(rows.train)))
    random.Random(f"demonstrations:{seed}").shuffle(order)
    by_class: dict[Hashable, list[int]] = {}
    for index in order:
        label = task.answer(rows.train[index]) if task.is_classification else ""
        by_class.setdefault(label, []).append(index)
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += [indices.pop(0) for indices in by_class.values() if indices]
    drawn = drawn[:count]
    random.Random(f"order:{seed}").shuffle(drawn)  # else the last one would always be of the last class
    text = SEPARATOR.join(_demonstration(task, rows.train[index]) for index in drawn)
    train = rows.train.select([index for index in range(len(rows.train)) if index not in set(drawn)])
    return dataclasses.replace(rows, train=train, demonstrations=text)


def _demonstration(task: Task, row: dict[str, Any]) -> str:
    return task.render(row) + task.lead + task.golds(row)[0]


def encode_context(tokenizer: Any, text: str) -> tuple[tuple[int, ...], int]:
    """The tokens of a context that precedes another text, and the number of leading special tokens among them.

    Control tokens in the context are read as plain text.
    """
    [example] = encode(_TEXT, tokenizer, [{"context": text + SEPARATOR}], _NO_LIMIT, appends_eos=False, answers=False)[
        0
    ]
    [empty] = encode(_TEXT, tokenizer, [{"context": "x"}], _NO_LIMIT, appends_eos=False, answers=False)[0]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    leading = next((index for index, token in enumerate(empty.input_ids) if token not in special), len(empty.input_ids))
    return example.input_ids, leading
