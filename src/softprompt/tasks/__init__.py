"""Tasks: rows, their tokenization and splits, and the scores of answers; `TASKS` has the built-in tasks by name."""

import importlib
from typing import TYPE_CHECKING, Any

from softprompt.tasks import builtin  # noqa: F401  (importing it registers the built-in tasks)
from softprompt.tasks.metrics import METRICS, Answers, Metric
from softprompt.tasks.score import Prediction, Score, read_answers, score
from softprompt.tasks.task import READERS, TASKS, Task, Template, register

if TYPE_CHECKING:
    from softprompt.tasks.data.chat import (
        chat_ids,
        check_context_layout,
        encode_system_message,
        with_answered_turns,
    )
    from softprompt.tasks.data.collate import IGNORED, Batch, answer_labels, batches, collate, schedule
    from softprompt.tasks.data.context import SEPARATOR, encode_context, split_demonstrations
    from softprompt.tasks.data.examples import Example, Examples, input_lengths
    from softprompt.tasks.data.images import sample_pixels, unlabeled_images, with_augmentation
    from softprompt.tasks.data.splits import SAME_ROWS, Splits, load_test_split, shots, splits
    from softprompt.tasks.data.tabular import read_rows, row_id, row_name, row_number, task_rows
    from softprompt.tasks.data.tokenize import answer_ids, check_input_kind, encode, strip_end, template_prefix
    from softprompt.tasks.user import load_task
else:  # for mypy too, it would stand for any name

    def __getattr__(name: str) -> Any:
        if name not in _LOCATIONS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _LOCATIONS[name].split(":")
        return getattr(importlib.import_module(module), attribute)


_LOCATIONS = {
    "Batch": "softprompt.tasks.data.collate:Batch",
    "Example": "softprompt.tasks.data.examples:Example",
    "Examples": "softprompt.tasks.data.examples:Examples",
    "IGNORED": "softprompt.tasks.data.collate:IGNORED",
    "SAME_ROWS": "softprompt.tasks.data.splits:SAME_ROWS",
    "SEPARATOR": "softprompt.tasks.data.context:SEPARATOR",
    "Splits": "softprompt.tasks.data.splits:Splits",
    "answer_ids": "softprompt.tasks.data.tokenize:answer_ids",
    "answer_labels": "softprompt.tasks.data.collate:answer_labels",
    "batches": "softprompt.tasks.data.collate:batches",
    "chat_ids": "softprompt.tasks.data.chat:chat_ids",
    "check_context_layout": "softprompt.tasks.data.chat:check_context_layout",
    "check_input_kind": "softprompt.tasks.data.tokenize:check_input_kind",
    "collate": "softprompt.tasks.data.collate:collate",
    "encode": "softprompt.tasks.data.tokenize:encode",
    "encode_context": "softprompt.tasks.data.context:encode_context",
    "encode_system_message": "softprompt.tasks.data.chat:encode_system_message",
    "input_lengths": "softprompt.tasks.data.examples:input_lengths",
    "load_task": "softprompt.tasks.user:load_task",
    "load_test_split": "softprompt.tasks.data.splits:load_test_split",
    "read_rows": "softprompt.tasks.data.tabular:read_rows",
    "row_id": "softprompt.tasks.data.tabular:row_id",
    "row_name": "softprompt.tasks.data.tabular:row_name",
    "row_number": "softprompt.tasks.data.tabular:row_number",
    "sample_pixels": "softprompt.tasks.data.images:sample_pixels",
    "schedule": "softprompt.tasks.data.collate:schedule",
    "shots": "softprompt.tasks.data.splits:shots",
    "split_demonstrations": "softprompt.tasks.data.context:split_demonstrations",
    "splits": "softprompt.tasks.data.splits:splits",
    "strip_end": "softprompt.tasks.data.tokenize:strip_end",
    "task_rows": "softprompt.tasks.data.tabular:task_rows",
    "template_prefix": "softprompt.tasks.data.tokenize:template_prefix",
    "unlabeled_images": "softprompt.tasks.data.images:unlabeled_images",
    "with_answered_turns": "softprompt.tasks.data.chat:with_answered_turns",
    "with_augmentation": "softprompt.tasks.data.images:with_augmentation",
}
"""Public names that need torch, transformers or datasets: imported at first use, so that listing tasks needs none."""

__all__ = [
    "IGNORED",
    "METRICS",
    "READERS",
    "SAME_ROWS",
    "SEPARATOR",
    "TASKS",
    "Answers",
    "Batch",
    "Example",
    "Examples",
    "Metric",
    "Prediction",
    "Score",
    "Splits",
    "Task",
    "Template",
    "answer_ids",
    "answer_labels",
    "batches",
    "chat_ids",
    "check_context_layout",
    "check_input_kind",
    "collate",
    "encode",
    "encode_context",
    "encode_system_message",
    "input_lengths",
    "load_task",
    "load_test_split",
    "read_answers",
    "read_rows",
    "register",
    "row_id",
    "row_name",
    "row_number",
    "sample_pixels",
    "schedule",
    "score",
    "shots",
    "split_demonstrations",
    "splits",
    "strip_end",
    "task_rows",
    "template_prefix",
    "unlabeled_images",
    "with_answered_turns",
    "with_augmentation",
]
