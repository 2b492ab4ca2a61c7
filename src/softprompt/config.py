"""What is to be done, as one frozen value: backbone, task, prompt, training, seed."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, final, get_args

import tyro

from softprompt.assets import ASSETS
from softprompt.prompts import PromptConfig
from softprompt.prompts.dpt import DPT
from softprompt.types import Augment, Baseline, Dtype, Pool, PromptAttention, PromptPosition, Protocol, unusual_layout


@final
@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a prompt is trained."""

    steps: int = 300
    """Optimiser steps."""
    batch_size: int = 16
    """Rows a step."""
    lr: float = 0.03
    """Peak learning rate, in units of the prompt's scale; the same number fits every backbone."""
    vocabulary_weight: float = 0.0
    """Weight, from 0 to 1, of -log P(label words) in the loss of a classification, beside the cross-entropy among the
    label words. At 0 a model that writes freely need not write a label word; 1 is the cross-entropy of the answer's
    tokens over the vocabulary (as the papers), which a task without label words always takes."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["linear", "cosine", "none"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    weight_decay: float = 1e-5
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    dropout: bool = False
    """Keep the frozen model's own dropout on while training, as the papers do; it costs time and seldom helps."""
    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in, one after another; saves memory and changes nothing else."""
    gradient_checkpointing: bool = False
    """Compute each layer of the frozen model again in the backward pass instead of keeping what it needs; saves memory
    for about a third more time, and changes nothing else."""
    shard: bool = False
    """Each of several processes holds its part of the frozen model's layers, gathered whenever one runs (FSDP), and not
    a copy of them all; saves memory, and changes nothing else but what a method itself draws."""
    eval_steps: int = 50
    """Steps between two evaluations on the development split, each with a checkpoint."""
    patience: int = 0
    """Stop after this many evaluations without an improvement; 0: never."""
    dev_rows: int = 500
    """Development rows looked at in training, drawn by the seed; 0: all."""
    test_rows: int = 0
    """Test rows scored at the end, drawn by the task's own fixed seed; 0: all."""
    max_input_tokens: int = 0
    """Longest input; longer rows lose the end of their longest field. 0: what the task says."""
    image_size: int = 0
    """Side in pixels that images are brought to, a whole number of patches; 0: what the backbone was made for."""
    augment: Augment = "none"
    """What happens to training images each time that they are seen: nothing, a random crop, and a mirror image."""
    zero_shot: bool = False
    """Also score the model without a prompt, with the same template, at the end."""
    max_new_tokens: int = 64
    """Most tokens of an answer, in a generation."""
    shots: int = 0
    """Training rows a class (few-shot); 0: all."""
    shots_balanced: bool = True
    """Draw that many shots of each class; else that many in all, as they come."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "eval_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "patience",
            "dev_rows",
            "test_rows",
            "max_input_tokens",
            "image_size",
            "shots",
            "weight_decay",
            "max_grad_norm",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not (0 < self.lr < math.inf):
            raise ValueError(f"lr is {self.lr}; it must be a positive number (0.03 is the default)")
        if self.augment not in get_args(Augment):
            raise ValueError(f"augment is {self.augment!r}; it must be {' or '.join(get_args(Augment))}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; it is a share of the steps, from 0 to 1")
        if not 0 <= self.vocabulary_weight <= 1:
            raise ValueError(f"vocabulary_weight is {self.vocabulary_weight}; it must be from 0 to 1")
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps} and batch_size "
                f"{self.batch_size}; a part needs at least one row"
            )

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        rising = round(self.warmup_ratio * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        share = (step - rising) / max(self.steps - rising, 1)
        fall = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "none": 1.0}
        return self.lr * fall[self.lr_scheduler]


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run, fully said: equal experiments give equal results on one machine.

    >>> Experiment(task="boolq", prompt=DPT(rank=5)).hash == Experiment(task="boolq", prompt=DPT(rank=5)).hash
    True
    """

    backbone: str = "smollm2-135m"
    """Hub id, folder, .gguf file or asset."""
    task: str = "sentiment"
    """Name of a built-in task, or path of the TOML file of your own."""
    data: str | None = None
    """Where the task's rows are, if not where the task says: a file of training rows, or SuperGLUE's or GLUE's official
    folder."""
    protocol: Protocol = "heldout"
    """What an official validation split is for: half to select and half to report, or the whole of it for both, as the
    papers did (paper); the result then says so, and dev_rows does not apply."""
    prompt: Annotated[PromptConfig, tyro.conf.Suppress] = field(default_factory=DPT)  # a subcommand, see cli/train.py
    """The method and its settings."""
    depth: Literal["shallow", "deep"] = "shallow"
    """In a vision model: the prompt enters at the first layer, or every layer has one of its own."""
    prompt_position: PromptPosition = "prefix"
    """In a text model: the prompt stands in front of the text, after its first token (a decoder's beginning of
    sequence), or behind the text and in front of the answer. In front it costs least; a baseline has no prompt."""
    prompt_attention: PromptAttention = "full"
    """In an encoder or encoder-decoder: the prompt's places see the text too, or (isolated) the prompt alone, which
    then runs once for all rows: another model, and a faster one."""
    pool: Pool = "cls"
    """In a vision model: the head sees [CLS], or the mean of the patches."""
    baseline: Baseline = "none"
    """Train this instead of a prompt, to compare with; the prompt is then left out."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How it is trained."""
    init_prompt: str | None = None
    """A run or a PEFT prompt-tuning folder whose prompt is the start (a warm start), in place of the method's own."""
    seed: int = 0
    """Of the prompt's first values, the order of rows and all draws."""
    dtype: Dtype = "auto"
    """What the frozen backbone computes in; the prompt and the optimiser are always float32."""

    def __post_init__(self) -> None:
        if self.depth not in ("shallow", "deep"):
            raise ValueError(f"depth is {self.depth!r}; it must be 'shallow' or 'deep'")
        if self.prompt_position not in get_args(PromptPosition):
            raise ValueError(
                f"prompt_position is {self.prompt_position!r}; it must be {' or '.join(get_args(PromptPosition))}"
            )
        if self.prompt_attention not in get_args(PromptAttention):
            raise ValueError(
                f"prompt_attention is {self.prompt_attention!r}; it must be {' or '.join(get_args(PromptAttention))}"
            )
        if self.pool not in get_args(Pool):
            raise ValueError(f"pool is {self.pool!r}; it must be {' or '.join(get_args(Pool))}")
        if self.protocol not in get_args(Protocol):
            raise ValueError(f"protocol is {self.protocol!r}; it must be {' or '.join(get_args(Protocol))}")

    @property
    def method(self) -> str:
        """What is trained: the prompt's method, or the baseline."""
        return self.prompt.name if self.baseline == "none" else self.baseline

    @property
    def unusual_layout(self) -> str:
        """How the prompt lies in the input, where that is not the way of other software; else empty."""
        return unusual_layout(self.prompt_position, self.prompt_attention) if self.baseline == "none" else ""

    @property
    def backbone_dtype(self) -> Dtype:
        """What the backbone is loaded in: float32 where every weight is trained and nothing else is asked for."""
        return "float32" if self.baseline == "full" and self.dtype == "auto" else self.dtype

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, without later fields at their defaults: earlier runs are still known by it."""
        values = self.to_json()
        kept = {name: value for name, value in values.items() if _LATER.get(name, ...) != value}
        kept["training"] = {name: value for name, value in values["training"].items() if name not in MEMORY_OPTIONS}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def with_memory_options(self, other: "Experiment") -> "Experiment":
        """The same experiment, with every means that either asks for: those save memory and change no result."""
        means = {name: getattr(self.training, name) or getattr(other.training, name) for name in MEMORY_OPTIONS}
        return self.replace(training=dataclasses.replace(self.training, **means))

    def located(self) -> "Experiment":
        """The same with absolute paths, so that a run can be used from any folder.

        What is called as an asset or a built-in task is that, also beside a folder of the name.
        """
        from softprompt.tasks import TASKS

        builtin = {"backbone": self.backbone in ASSETS, "task": self.task.partition(":")[0] in TASKS}
        names = (name for name in ("backbone", "task", "data", "init_prompt") if not builtin.get(name))
        given = {name: Path(getattr(self, name) or "").expanduser() for name in names}
        return self.replace(
            **{name: str(path.resolve()) for name, path in given.items() if path.name and path.exists()}
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is its inverse."""
        return {**dataclasses.asdict(self), "prompt": self.prompt.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Experiment":
        """The experiment that wrote `values`.

        Raises:
            ValueError: an unknown setting, by name.
        """
        settings = dict(values)
        _refuse_unknown(cls, settings)
        training = dict(settings.pop("training", {}))
        _refuse_unknown(TrainingConfig, training)
        prompt = PromptConfig.from_json(settings.pop("prompt"))
        return cls(**settings, prompt=prompt, training=TrainingConfig(**training))

    def replace(self, **changes: Any) -> "Experiment":
        """The same experiment but for `changes`."""
        return dataclasses.replace(self, **changes)


_LATER = {"prompt_position": "prefix", "prompt_attention": "full"}
"""Fields that experiments did not have at first, with the default, which is what was done then."""

MEMORY_OPTIONS = ("gradient_checkpointing", "shard")
"""Settings of a training that change what it needs and not what comes of it."""


def _refuse_unknown(kind: type[Any], values: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
