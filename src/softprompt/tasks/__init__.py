"""Tasks: rows, their tokenization and splits, and the scores of answers; `TASKS` has the built-in tasks by name."""

from softprompt.tasks import builtin  # noqa: F401  (importing it registers the built-in tasks)
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
from softprompt.tasks.metrics import METRICS, Answers, Metric
from softprompt.tasks.score import Prediction, Score, read_answers, score
from softprompt.tasks.task import READERS, TASKS, Task, Template, register
from softprompt.tasks.user import load_task

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
