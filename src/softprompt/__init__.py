"""Decomposed prompt tuning and related methods: a task as a few thousand parameters in front of a frozen model.

>>> import softprompt
>>> softprompt.DPT(length=100, rank=10).count(768)
8680
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from softprompt.analysis.report import report
    from softprompt.backbones import Backbone
    from softprompt.backbones import load as load_backbone
    from softprompt.config import Experiment, TrainingConfig
    from softprompt.evaluation.evaluate import evaluate
    from softprompt.evaluation.predict import Answer, predict
    from softprompt.export import export_peft
    from softprompt.models import PromptedModel, Sampling, attach
    from softprompt.prompts import METHODS, Folded, Host, PromptConfig, PromptOnly, SoftPrompt
    from softprompt.prompts.adept import ADePT
    from softprompt.prompts.bpt import BPT
    from softprompt.prompts.dept import DePT
    from softprompt.prompts.dpt import DPT
    from softprompt.prompts.plain import Plain
    from softprompt.prompts.residual import Residual
    from softprompt.prompts.spectral import Spectral
    from softprompt.prompts.ulpt import ULPT
    from softprompt.runs import Run, list_runs, open_run, read_prompt
    from softprompt.sweep import sweep
    from softprompt.tasks import TASKS, Score, Task
    from softprompt.tasks.user import load_task
    from softprompt.training.callbacks import Interrupted, Progress, TrainingCallback
    from softprompt.training.trainer import resume, train

_LOCATIONS = {
    "ADePT": "softprompt.prompts.adept:ADePT",
    "Answer": "softprompt.evaluation.predict:Answer",
    "PromptedModel": "softprompt.models:PromptedModel",
    "BPT": "softprompt.prompts.bpt:BPT",
    "Backbone": "softprompt.backbones:Backbone",
    "DPT": "softprompt.prompts.dpt:DPT",
    "DePT": "softprompt.prompts.dept:DePT",
    "Experiment": "softprompt.config:Experiment",
    "Folded": "softprompt.prompts:Folded",
    "Host": "softprompt.prompts:Host",
    "Interrupted": "softprompt.training.callbacks:Interrupted",
    "METHODS": "softprompt.prompts:METHODS",
    "Plain": "softprompt.prompts.plain:Plain",
    "Progress": "softprompt.training.callbacks:Progress",
    "PromptConfig": "softprompt.prompts:PromptConfig",
    "PromptOnly": "softprompt.prompts:PromptOnly",
    "Residual": "softprompt.prompts.residual:Residual",
    "Run": "softprompt.runs:Run",
    "Sampling": "softprompt.models:Sampling",
    "Score": "softprompt.tasks:Score",
    "SoftPrompt": "softprompt.prompts:SoftPrompt",
    "Spectral": "softprompt.prompts.spectral:Spectral",
    "TASKS": "softprompt.tasks:TASKS",
    "ULPT": "softprompt.prompts.ulpt:ULPT",
    "Task": "softprompt.tasks:Task",
    "TrainingConfig": "softprompt.config:TrainingConfig",
    "TrainingCallback": "softprompt.training.callbacks:TrainingCallback",
    "attach": "softprompt.models:attach",
    "evaluate": "softprompt.evaluation.evaluate:evaluate",
    "export_peft": "softprompt.export:export_peft",
    "list_runs": "softprompt.runs:list_runs",
    "load_backbone": "softprompt.backbones:load",
    "load_task": "softprompt.tasks.user:load_task",
    "open_run": "softprompt.runs:open_run",
    "predict": "softprompt.evaluation.predict:predict",
    "read_prompt": "softprompt.runs:read_prompt",
    "report": "softprompt.analysis.report:report",
    "resume": "softprompt.training.trainer:resume",
    "sweep": "softprompt.sweep:sweep",
    "train": "softprompt.training.trainer:train",
}
"""The module and attribute of each public name: imported at first use, so that `softprompt --help` loads no torch."""

__all__ = [
    "BPT",
    "DPT",
    "METHODS",
    "TASKS",
    "ULPT",
    "ADePT",
    "Answer",
    "Backbone",
    "DePT",
    "Experiment",
    "Folded",
    "Host",
    "Interrupted",
    "Plain",
    "Progress",
    "PromptConfig",
    "PromptOnly",
    "PromptedModel",
    "Residual",
    "Run",
    "Sampling",
    "Score",
    "SoftPrompt",
    "Spectral",
    "Task",
    "TrainingCallback",
    "TrainingConfig",
    "attach",
    "evaluate",
    "export_peft",
    "list_runs",
    "load_backbone",
    "load_task",
    "open_run",
    "predict",
    "read_prompt",
    "report",
    "resume",
    "sweep",
    "train",
]


class _Package(ModuleType):
    """A package in which a public name such as `softprompt.sweep` stays the function after its module is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LOCATIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _LOCATIONS:
            raise AttributeError(f"module 'softprompt' has no attribute {name!r}")
        module, attribute = _LOCATIONS[name].split(":")
        value = getattr(importlib.import_module(module), attribute)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
