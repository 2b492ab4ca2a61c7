"""The configuration of one training run, immutable: backbone, task, prompt, training, seed."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, final, get_args, get_origin

import tyro

from softprompt.assets import ASSETS
from softprompt.prompts import PromptConfig
from softprompt.prompts.dpt import DPT
from softprompt.types import (
    Augment,
    Baseline,
    Dtype,
    Pool,
    PromptAttention,
    PromptPosition,
    Protocol,
    check_finite,
    unusual_layout,
)


@final
@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Hyperparameters of the training loop, and how it evaluates."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Rows per step."""
    lr: float = 0.03
    """Peak learning rate, relative to the prompt's scale, so one value suits every backbone. Baselines use a fraction:
    LoRA 0.03, full fine-tuning 0.001."""
    vocabulary_weight: float | None = None
    """Weight, from 0 to 1, of -log P(label words) in a classification loss, added to the cross-entropy among the label
    words; None: 0.03 if the model answers in words, so that it also produces label words in free generation (at 0 it
    may not). 1 is the cross-entropy of the answer's tokens over the vocabulary (as in the papers), which tasks without
    label words always use."""
    temperature: float = 1.0
    """Temperature of a distillation (`context`, `demonstrations`); above 1, less likely tokens count for more."""
    warmup_ratio: float = 0.1
    """Fraction of the steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["linear", "cosine", "none"] = "linear"
    """How the learning rate decays to 0 after the warmup."""
    weight_decay: float = 1e-5
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are clipped; 0: no clipping."""
    dropout: bool = False
    """Keep the frozen model's own dropout on during training, as the papers do; costs time and rarely helps."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that each batch is split into; saves memory and changes nothing else."""
    gradient_checkpointing: bool = False
    """Recompute each layer of the frozen model in the backward pass instead of storing its activations; saves memory,
    takes about a third more time, and changes nothing else."""
    shard: bool = False
    """Shard the frozen model's layers over the processes (FSDP) instead of copying them to each; saves memory, and
    changes nothing else except a method's own random draws."""
    eval_steps: int = 50
    """Steps between evaluations on the development split; each evaluation also writes a checkpoint."""
    patience: int = 0
    """Stop early after this many evaluations without an improvement; 0: never."""
    dev_rows: int = 500
    """Development rows scored during training, sampled with the seed; 0: all."""
    test_rows: int = 0
    """Test rows scored at the end, sampled with the task's own fixed seed; 0: all."""
    max_input_tokens: int = 0
    """Longest input in tokens; longer rows lose the end of their longest field. 0: the task's limit."""
    image_size: int = 0
    """Side in pixels that images are resized to, a whole number of patches; 0: the backbone's own size."""
    augment: Augment = "none"
    """Augmentation of training images each time they are used: none, a random crop, or a crop and a random flip."""
    zero_shot: bool = False
    """Also score the model without a prompt at the end, with the same template."""
    max_new_tokens: int = 64
    """Maximum number of generated tokens per answer."""
    shots: int = 0
    """Training rows per class (few-shot); 0: all."""
    shots_balanced: bool = True
    """Sample that many shots of each class; otherwise that many in total, regardless of class."""

    def __post_init__(self) -> None:
        _check_literals(self)
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
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be a positive number (0.03 is the default)")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be a positive number (1 is the default)")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; it must be a fraction of the steps, from 0 to 1")
        if self.vocabulary_weight is not None and not 0 <= self.vocabulary_weight <= 1:
            raise ValueError(f"vocabulary_weight is {self.vocabulary_weight}; it must be from 0 to 1")
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps} and batch_size "
                f"{self.batch_size}; a micro-batch needs at least one row"
            )
        check_finite(self)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        warmup_steps = round(self.warmup_ratio * self.steps)
        if step < warmup_steps:
            return self.lr * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(self.steps - warmup_steps, 1)
        decay = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "none": 1.0}
        return self.lr * decay[self.lr_scheduler]


@final
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The full configuration of a training run: equal experiments give equal results on one machine.

    >>> Experiment(task="boolq", prompt=DPT(rank=5)).hash == Experiment(task="boolq", prompt=DPT(rank=5)).hash
    True
    """

    backbone: str = "smollm2-135m"
    """Hub id, folder, .gguf file or asset."""
    task: str = "sentiment"
    """Name of a built-in task, or path of a task's TOML file; `distil` makes its own."""
    data: str | None = None
    """Replaces the task's own source of rows: a file of training rows, or the official SuperGLUE or GLUE folder; not
    with `distil`."""
    protocol: Protocol = "heldout"
    """How an official validation split is used: half for selection and half for the report (heldout), or all of it for
    both, as in the papers (paper); the result then says so, and dev_rows does not apply."""
    prompt: Annotated[PromptConfig, tyro.conf.Suppress] = field(default_factory=DPT)  # a subcommand, see cli/train.py
    """The method and its settings."""
    depth: Literal["shallow", "deep"] = "shallow"
    """One prompt in front of the input (shallow), or one for every layer (deep): vectors in a vision model, keys and
    values in a decoder (prefix tuning), which start as those of the shallow prompt."""
    prompt_position: PromptPosition = "prefix"
    """In a text model: the prompt is inserted before the text, after its first token (a decoder's beginning of
    sequence), or after the text and before the answer. The prefix is cheapest; a baseline has no prompt."""
    prompt_attention: PromptAttention = "full"
    """In an encoder or encoder-decoder: the prompt attends to the text too (full), or only to itself (self). The latter
    runs the prompt once for all rows: a different and faster model."""
    pool: Pool = "cls"
    """In a vision model: the head reads [CLS], or the mean over the patches."""
    baseline: Baseline = "none"
    """Train this baseline instead of a prompt, for comparison."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Hyperparameters of the training."""
    context: str | None = None
    """A text file to distil (`distil` needs one): the frozen model that reads it before each row (in a chat task as the
    system message) is the teacher, and the prompt is trained to give the teacher's distribution without it. The
    rows' own answers then only determine at which tokens the two are compared."""
    demonstrations: int = 0
    """Labeled training rows in front of each row, as the context to distil (after the text of `context`, if both are
    given); the prompt is not trained on these rows. Not with `distil`."""
    init_prompt: str | None = None
    """A run or a PEFT prompt folder from whose prompt training starts, instead of the method's own initialization;
    `hub:USER/NAME` is one on the Hugging Face Hub."""
    seed: int = 0
    """Seed of the prompt's initialization, the order of rows and all random draws."""
    dtype: Dtype = "auto"
    """What the frozen backbone computes in; the prompt and the optimizer are always float32."""

    def __post_init__(self) -> None:
        _check_literals(self)
        check_finite(self)
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")

    @property
    def method(self) -> str:
        """What is trained: the prompt's method, or the baseline."""
        return self.prompt.name if self.baseline == "none" else self.baseline

    @property
    def unusual_layout(self) -> str:
        """A prompt position or attention that other software does not support, in words; empty for the usual one."""
        return unusual_layout(self.prompt_position, self.prompt_attention) if self.baseline == "none" else ""

    @property
    def backbone_dtype(self) -> Dtype:
        """The dtype to load the backbone in: float32 if every weight is trained and `dtype` is `auto`."""
        return "float32" if self.baseline == "full" and self.dtype == "auto" else self.dtype

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON.

        Memory options, and fields added later while at their defaults, are left out: they do not change the result.
        """
        values = self.to_json()
        training = values.pop("training")
        hashed = {name: value for name, value in values.items() if _LATER_FIELDS.get(name, ...) != value}
        hashed["training"] = {
            name: value
            for name, value in training.items()
            if name not in MEMORY_OPTIONS and _LATER_TRAINING_FIELDS.get(name, ...) != value
        }
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    def with_memory_options(self, other: "Experiment") -> "Experiment":
        """The same experiment with every memory option that either of the two has on."""
        options = {name: getattr(self.training, name) or getattr(other.training, name) for name in MEMORY_OPTIONS}
        return self.replace(training=dataclasses.replace(self.training, **options))

    def with_absolute_paths(self) -> "Experiment":
        """The same experiment with absolute paths, so that a run can be used from any folder.

        The name of an asset or a built-in task stays, even if a folder of that name exists.
        """
        from softprompt.tasks import TASKS

        builtin = {"backbone": self.backbone in ASSETS, "task": self.task.partition(":")[0] in TASKS}
        names = (name for name in ("backbone", "task", "data", "init_prompt", "context") if not builtin.get(name))
        paths = {name: Path(getattr(self, name) or "").expanduser() for name in names}
        return self.replace(
            **{name: str(path.resolve()) for name, path in paths.items() if path.name and path.exists()}
        )

    def to_json(self) -> dict[str, Any]:
        """The experiment as plain values; `from_json` is the inverse."""
        return {**dataclasses.asdict(self), "prompt": self.prompt.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Experiment":
        """The experiment whose `to_json` gave `values`.

        Raises:
            ValueError: an unknown setting, by name, or a value that does not fit.
        """
        settings = dict(values)
        _check_known(cls, settings)
        training = dict(settings.pop("training", {}))
        _check_known(TrainingConfig, training)
        prompt = PromptConfig.from_json(settings.pop("prompt"))
        return cls(**settings, prompt=prompt, training=TrainingConfig(**training))

    def replace(self, **changes: Any) -> "Experiment":
        """A copy with `changes`."""
        return dataclasses.replace(self, **changes)


MAX_SEED = 2**63 - 1
"""The largest seed that every random generator takes."""

DEFAULT_VOCABULARY_WEIGHT = 0.03
"""Of a model that answers in words; measured in docs/results/superglue."""

_LATER_FIELDS: dict[str, Any] = {
    "prompt_position": "prefix",
    "prompt_attention": "full",
    "context": None,
    "demonstrations": 0,
}
"""Fields added after the first runs, with the default that those runs used."""
_LATER_TRAINING_FIELDS: dict[str, Any] = {"temperature": 1.0}
"""The same for the fields of `training`."""

MEMORY_OPTIONS = ("gradient_checkpointing", "shard")
"""Training settings that change the memory needed, and not the result."""


def _check_literals(config: Any) -> None:
    """Check that every field declared as a `Literal` holds one of its choices.

    Raises:
        ValueError: naming the field, its value and the choices.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if get_origin(item.type) is Literal and value not in get_args(item.type):
            raise ValueError(f"{item.name} is {value!r}; it must be {' or '.join(get_args(item.type))}")


def _check_known(kind: type[Any], values: Mapping[str, Any]) -> None:
    known = {item.name for item in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
