"""Tasks: what is learned, its rows, its tokens and its scores; `TASKS` has the built-in ones by name."""

from softprompt.tasks import builtin  # noqa: F401  (importing it registers the built-in tasks)
from softprompt.tasks.data.collate import IGNORED, Batch, answer_labels, batches, collate, schedule
from softprompt.tasks.data.context import SEPARATOR, encode_context, split_demonstrations
from softprompt.tasks.data.examples import Example, Examples, input_lengths
from softprompt.tasks.data.images import augmented, sample, unlabelled
from softprompt.tasks.data.splits import SAME_ROWS, Splits, check, cut, given_rows, shots, splits
from softprompt.tasks.data.tabular import read_rows, row_id, row_name, row_number, task_rows
from softprompt.tasks.data.tokenize import answer_ids, beginning, encode, refuse_other_input, strip_end
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
    "augmented",
    "batches",
    "beginning",
    "check",
    "collate",
    "cut",
    "encode",
    "encode_context",
    "given_rows",
    "input_lengths",
    "load_task",
    "read_answers",
    "read_rows",
    "refuse_other_input",
    "register",
    "row_id",
    "row_name",
    "row_number",
    "sample",
    "schedule",
    "score",
    "shots",
    "split_demonstrations",
    "splits",
    "strip_end",
    "task_rows",
    "unlabelled",
]
