"""Warnings about splits that work but mislead: rows that recur in the training split, answers that count as one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from softprompt.tasks.metrics.texts import NORMALIZE
from softprompt.tasks.task import Task

Keys = tuple[int, int | None]
"""Hashes of a row's input and of its group; None without a group."""


def row_keys(task: Task, row: Mapping[str, Any]) -> Keys:
    """The row's keys for `overlap_warning`; of an image row, `row` has the digest in place of the image."""
    text = row[task.image] if task.image else task.render(row)
    return hash(text), hash(str(row[task.group])) if task.group else None


def overlap_warning(task: Task, train: Sequence[Keys], others: Mapping[str, Sequence[Keys]]) -> str | None:
    """Warn that rows of other splits have an input or a group that a training row has; None if there are none.

    Args:
        train: of the training rows.
        others: of the other splits' rows, by the name of the split.
    """
    inputs, groups = {key for key, _ in train}, {group for _, group in train} - {None}
    counts = {
        name: sum(key in inputs or group in groups for key, group in keys) for name, keys in others.items() if keys
    }
    if not any(counts.values()):
        return None
    of_splits = " and ".join(f"{count} of {len(others[name])} {name} rows" for name, count in counts.items() if count)
    group = f" or the {task.group!r}" if task.group else ""
    remedy = "take them out" if task.group else "take them out, or name the column of what belongs together as `group`"
    return f"{of_splits} have the input{group} of a training row, so a score of them says little of new rows; {remedy}"


def equal_golds_warning(task: Task, golds: Iterable[str]) -> str | None:
    """Warn that a metric of the task takes different gold answers for one; None if it takes none.

    Texts that differ in case and surrounding space only are not different.
    """
    name = next((name for name in task.metrics if name in NORMALIZE), None)
    if name is None:
        return None
    by_key: dict[str, list[str]] = {}
    for gold in sorted({gold.strip().casefold(): gold for gold in sorted(set(golds))}.values()):
        by_key.setdefault(NORMALIZE[name](gold), []).append(gold)
    equal = [texts for texts in by_key.values() if len(texts) > 1]
    if not equal:
        return None
    first, second = equal[0][:2]
    more = f" (one of {len(equal)} such cases)" if len(equal) > 1 else ""
    return (
        f"{name} of task {task.name!r} counts {first[:60]!r} and {second[:60]!r} as one answer{more}; if they are not, "
        "write them so that they differ in a letter or a digit"
    )
