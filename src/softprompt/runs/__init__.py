"""The run folder: written atomically, read without executing code, described by a model card."""

from softprompt.runs.creation import check_new_run, create, versions
from softprompt.runs.peft_prompt import PeftPrompt, check_has_own_task, open_peft_prompt, resolve_prompt
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
    prompt_kind,
    read_prompt,
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
    "PeftPrompt",
    "Run",
    "build_prompt",
    "build_prompted_model",
    "check_has_own_task",
    "check_new_run",
    "create",
    "json_line",
    "list_runs",
    "open_peft_prompt",
    "open_run",
    "prompt_kind",
    "read_prompt",
    "resolve_prompt",
    "run_folders",
    "versions",
]
