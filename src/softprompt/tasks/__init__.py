"""Tasks and the scores of answers; `TASKS` has the built-in tasks by name. Rows and tokens are in `tasks.data`.

Nothing here needs torch, so that listing tasks does not load it.
"""

from softprompt.tasks import builtin  # noqa: F401  (importing it registers the built-in tasks)
from softprompt.tasks.metrics import METRICS, Answers, Metric
from softprompt.tasks.score import Prediction, Score, read_answers, score
from softprompt.tasks.task import READERS, TASKS, Task, Template, register

__all__ = [
    "METRICS",
    "READERS",
    "TASKS",
    "Answers",
    "Metric",
    "Prediction",
    "Score",
    "Task",
    "Template",
    "read_answers",
    "register",
    "score",
]
