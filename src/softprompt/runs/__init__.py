"""The run folder: written atomically, read without executing code, described by a model card."""

from softprompt.runs.creation import check_new_run, create, versions
from softprompt.runs.run import (
    HEAD,
    METRICS,
    PREDICTIONS,
    RECORD,
    TENSORS,
    TUNED,
    Gradient,
    Run,
    build_prompt,
    build_prompted_model,
    json_line,
    list_runs,
    open_run,
    read_prompt,
    resolve_run,
    run_folders,
)

__all__ = [
    "HEAD",
    "METRICS",
    "PREDICTIONS",
    "RECORD",
    "TENSORS",
    "TUNED",
    "Gradient",
    "Run",
    "build_prompt",
    "build_prompted_model",
    "check_new_run",
    "create",
    "json_line",
    "list_runs",
    "open_run",
    "read_prompt",
    "resolve_run",
    "run_folders",
    "versions",
]
