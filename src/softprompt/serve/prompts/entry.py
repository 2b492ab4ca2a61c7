"""A prompt that is served: from a run, a PEFT folder or an upload, with everything that answering with it needs."""

import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.evaluation.predict import input_limit
from softprompt.models import model_class
from softprompt.models.kv_prefix import KVPrefix
from softprompt.models.peft_folder import read_peft_folder
from softprompt.prompts import Folded, SoftPrompt
from softprompt.runs import open_run, prompt_kind
from softprompt.tasks import Task
from softprompt.tasks.data.tokenize import answer_ids
from softprompt.tasks.template import parse

BASE = "base"
"""The name that requests use for the model without a prompt."""
_log = logging.getLogger("softprompt.serve")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PromptEntry:
    """A prompt and its name, task, head and cached keys and values."""

    name: str
    prompt: Folded
    source: str
    """`run`, `peft` or `upload`; `base` without a prompt."""
    task: Task | None = None
    """What it was trained for, if known."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """In a classification: token ids of each label's words."""
    max_input_tokens: int | None = None
    """Longest input, as in training; None: the engine's limit."""
    max_new_tokens: int = 64
    """Longest answer, unless a request sets another length."""
    head: nn.Module | None = None
    """The trained head of an encoder without a vocabulary head, or of a vision model."""
    kv_prefix: KVPrefix | None = None
    """With a decoder: the prompt's keys and values."""
    template_prefix: KVPrefix | None = None
    """The same followed by the tokens that the task's template starts with, if those are many."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return len(self.prompt.prompt()) // self.prompt.num_matrices

    @property
    def kv_prefixes(self) -> tuple[KVPrefix, ...]:
        """All cached keys and values of the prompt."""
        return tuple(prefix for prefix in (self.kv_prefix, self.template_prefix) if prefix is not None)

    @property
    def classifies(self) -> bool:
        """Whether its task is a classification."""
        return self.task is not None and self.task.is_classification

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that its template reads; empty without a task."""
        if self.task is not None and self.task.image:
            return (self.task.image,)
        parts = () if self.task is None else parse(self.task.template)
        return tuple(dict.fromkeys(text for is_field, text in parts if is_field))

    def describe(self) -> dict[str, Any]:
        """What clients see of it, as JSON values."""
        task = self.task
        return {
            "name": self.name,
            "source": self.source,
            "length": self.length,
            "task": None if task is None else task.name,
            "template": None if task is None else task.template,
            "fields": list(self.fields),
            "image": bool(task is not None and task.image),
            "chat": bool(task is not None and task.messages),
            "labels": list(task.label_words) if task is not None and task.is_classification else [],
            "label_words": dict(task.label_words) if task is not None and task.is_classification else {},
            "max_new_tokens": self.max_new_tokens,
            "bytes": sum(prefix.nbytes for prefix in self.kv_prefixes),
            "created": self.created,
        }


def check_prompt_name(name: str) -> str:
    """Return the name if it can be part of URLs and paths.

    Raises:
        ValueError: other characters than letters, digits, dots, hyphens and underscores, or too long.

    >>> check_prompt_name("rte-dpt-0")
    'rte-dpt-0'
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name[:140]!r} cannot be a prompt name; use up to 128 letters, digits, dots, hyphens and underscores, a "
            "letter or digit first"
        )
    return files.check_name(name, "the prompt name")


def from_folder(name: str, folder: Path, backbone: Backbone) -> PromptEntry:
    """The prompt of a run or of a PEFT prompt-tuning folder.

    Raises:
        FileNotFoundError, NotADirectoryError: as `prompt_kind`.
        ValueError: the run is damaged, unfinished or a baseline, or was trained on another backbone.
    """
    if prompt_kind(folder) == "peft":
        adapter = read_peft_folder(folder)
        if note := adapter.base_note(backbone):
            _log.warning("%s", note)
        return from_prompt(name, adapter.prompt(backbone), backbone, source="peft")
    run = open_run(folder)
    if run.experiment.baseline != "none":
        raise ValueError(f"run {folder} is the baseline {run.experiment.baseline} and has no prompt to serve")
    if layout := run.experiment.unusual_layout:
        raise ValueError(
            f"the prompt of run {folder} is {layout}, but the service needs prompts in front of the text; use "
            "softprompt predict, or train one with prompt_position=prefix and prompt_attention=full"
        )
    prompted = run.prompted(backbone)
    assert prompted.prompt is not None
    task, training = run.task, run.experiment.training
    return PromptEntry(
        name=check_prompt_name(name),
        prompt=prompted.prompt.fold(),
        source="run",
        task=task,
        candidates=answer_ids(task, backbone.tokenizer) if task.is_classification else (),
        max_input_tokens=input_limit(prompted, task, training),
        max_new_tokens=training.max_new_tokens,
        head=prompted.head,
    )


def from_prompt(name: str, prompt: SoftPrompt, backbone: Backbone, source: str = "upload") -> PromptEntry:
    """A prompt without a task: it continues texts, and classifies with labels that a request brings.

    Raises:
        ValueError: the prompt does not have the backbone's width, or the backbone answers through a trained head.
    """
    if needs_head(backbone):
        raise ValueError(
            f"{display_name(backbone)} answers through a head that is trained with a prompt; give a run's folder"
        )
    folded = prompt.fold().to(backbone.device)
    backbone.check_prompt(folded.prompt(), folded.num_matrices)
    return PromptEntry(name=check_prompt_name(name), prompt=folded, source=source)


def base_entry(backbone: Backbone) -> PromptEntry:
    """The zero-shot model: no virtual tokens and no task."""
    no_tokens = torch.zeros(0, backbone.dim, device=backbone.device)
    return PromptEntry(name=BASE, prompt=Folded(no_tokens), source=BASE)


def needs_head(backbone: Backbone) -> bool:
    """Whether the backbone cannot score words and answers through a head that is trained with each prompt."""
    return model_class(backbone).needs_head(backbone)


def display_name(backbone: Backbone) -> str:
    """The backbone's name for clients, without its path on the disk."""
    return Path(backbone.source).name
