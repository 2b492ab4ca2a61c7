"""One prompt that is served: a run's, a PEFT folder's, or one that was sent, made ready for the backbone."""

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
from softprompt.models import PromptedModel, attach
from softprompt.prompts import Folded, SoftPrompt
from softprompt.runs import RECORD, open_run, read_prompt
from softprompt.serve.engine.kv_cache import KVPrefix
from softprompt.tasks import Task, answer_ids
from softprompt.tasks.template import parse

BASE = "base"
"""The model without a prompt, under the name by which it is asked."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class PromptEntry:
    """A prompt under its name, with all that answering with it takes."""

    name: str
    prompt: Folded
    source: str
    """`run`, `peft` or `sent`; `base` without a prompt."""
    task: Task | None = None
    """What it was trained for, where that is known."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """The tokens of the task's words, in a classification."""
    max_input_tokens: int | None = None
    """Most tokens of an input, as in training; none: what the engine allows."""
    max_new_tokens: int = 64
    """Most tokens of an answer, unless a request says otherwise."""
    head: nn.Module | None = None
    """What an encoder without words answers through."""
    state: KVPrefix | None = None
    """Its keys and values, in front of a decoder."""
    template_prefix: KVPrefix | None = None
    """The same with the words that its template begins with, where those are many."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return len(self.prompt.prompt())

    @property
    def states(self) -> tuple[KVPrefix, ...]:
        """All keys and values that are held."""
        return tuple(state for state in (self.state, self.template_prefix) if state is not None)

    @property
    def classifies(self) -> bool:
        """Whether it answers with labels of its own."""
        return self.task is not None and self.task.is_classification

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns that its template reads; none without a task."""
        if self.task is not None and self.task.image:
            return (self.task.image,)
        parts = () if self.task is None else parse(self.task.template)
        return tuple(dict.fromkeys(text for is_field, text in parts if is_field))

    def describe(self) -> dict[str, Any]:
        """What a client may know of it."""
        task = self.task
        return {
            "name": self.name,
            "source": self.source,
            "length": self.length,
            "task": None if task is None else task.name,
            "template": None if task is None else task.template,
            "fields": list(self.fields),
            "image": bool(task is not None and task.image),
            "labels": list(task.label_words) if task is not None and task.is_classification else [],
            "label_words": dict(task.label_words) if task is not None and task.is_classification else {},
            "max_new_tokens": self.max_new_tokens,
            "bytes": sum(state.bytes for state in self.states),
            "created": self.created,
        }


def checked_name(name: str) -> str:
    """The name, if it can be a prompt's: it is part of addresses and of paths.

    Raises:
        ValueError: other signs than letters, digits, dots, hyphens and underscores, or too long.

    >>> checked_name("rte-dpt-0")
    'rte-dpt-0'
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"the prompt name {name[:140]!r} is not one; take up to 128 letters, digits, dots, hyphens and "
            "underscores, a letter or digit first"
        )
    return files.check_name(name, "the prompt name")


def from_folder(name: str, folder: Path, backbone: Backbone) -> PromptEntry:
    """The prompt of a run or of a PEFT prompt-tuning folder.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it is damaged, unfinished, a baseline, or was trained on another backbone.
    """
    if not (folder / RECORD).is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}; give a run's or a PEFT prompt's")
        return from_prompt(name, read_prompt(folder, backbone), backbone, source="peft")
    run = open_run(folder)
    if run.experiment.baseline != "none":
        raise ValueError(f"run {folder} is the baseline {run.experiment.baseline} and has no prompt to serve")
    if own := run.experiment.unusual_layout:
        raise ValueError(
            f"the prompt of run {folder} is {own}, and requests share prompts that are in front of it; use softprompt "
            "predict, or train one with prompt_position=prefix and prompt_attention=full"
        )
    attached = run.prompted(backbone)
    assert attached.prompt is not None
    task, training = run.task, run.experiment.training
    return PromptEntry(
        name=checked_name(name),
        prompt=attached.prompt.fold(),
        source="run",
        task=task,
        candidates=answer_ids(task, backbone.tokenizer) if task.is_classification else (),
        max_input_tokens=input_limit(attached, task, training),
        max_new_tokens=training.max_new_tokens,
        head=attached.head,
    )


def from_prompt(name: str, prompt: SoftPrompt, backbone: Backbone, source: str = "sent") -> PromptEntry:
    """A prompt without a task: it continues texts, and classifies with the labels that a request brings.

    Raises:
        ValueError: it is as wide as another backbone's embeddings, or the backbone answers through a trained head.
    """
    if needs_head(backbone):
        raise ValueError(
            f"{called(backbone)} answers through a head that is trained with a prompt; give a run's folder"
        )
    folded = prompt.fold().to(backbone.device)
    if (width := folded.prompt().shape[1]) != backbone.dim:
        raise ValueError(
            f"the prompt is {width} wide, but {called(backbone)} embeds in {backbone.dim}; it was trained for another "
            "backbone"
        )
    return PromptEntry(name=checked_name(name), prompt=folded, source=source)


def without_prompt(backbone: Backbone) -> PromptEntry:
    """The zero-shot model: a prompt of no virtual tokens and no task."""
    matrix = torch.zeros(0, backbone.dim, device=backbone.device)
    return PromptEntry(name=BASE, prompt=Folded(matrix), source=BASE)


def needs_head(backbone: Backbone) -> bool:
    """Whether the backbone has no words, and answers through a head that is trained with each prompt."""
    return backbone.architecture == "vision" or (backbone.architecture == "encoder" and not backbone.masked_lm)


def called(backbone: Backbone) -> str:
    """The backbone's name for clients, who need not know where it lies on the disk."""
    return Path(backbone.source).name


def bare(backbone: Backbone, head: nn.Module | None = None) -> PromptedModel:
    """The backbone with no prompt of its own; every call brings its prompts."""
    return attach(backbone, None, head=head)
