"""The interface of a prompt method: what the model, the optimizer, saving and the command line need from it."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.types import check_finite

# Not `Self`: the tests' shape checker decorates methods, where it cannot be resolved.
ConfigT = TypeVar("ConfigT", bound="PromptConfig")

METHODS: dict[str, type["PromptConfig"]] = {}
"""Every method by name: `METHODS["dpt"] is DPT`. Filled by subclassing `PromptConfig`."""

Beyond = Literal["refuse", "none"]
"""For a token past the end of a position table: `refuse` raises an error, `none` adds no offset."""


@final
@dataclass(frozen=True)
class Host:
    """Everything a method may know about the frozen model, without any transformers type."""

    embedding: Float[Tensor, "vocab dim"]
    """The input embedding table, detached, in the dtype that the model has it in."""
    encode: Callable[[str], list[int]]
    """Text to token ids, without special tokens."""
    label_words: tuple[str, ...] = ()
    """The task's answers as the model would write them; empty where they are not a fixed list."""
    start: Float[Tensor, "prompt dim"] | None = None
    """A trained prompt to start from (a warm start), instead of a method's own initial values."""
    special: frozenset[int] = frozenset()
    """Ids of special tokens (padding, beginning of sequence); never drawn as initial values."""
    query_key: Callable[[], Float[Tensor, "dim dim"]] | None = None
    """Computes `W_q W_k^T` of the first attention layer, over all heads; raises for a model whose layout is unknown."""
    gradient: Callable[[Float[Tensor, "length dim"], int], Float[Tensor, "length dim"]] | None = None
    """Computes the mean gradient of the task's loss at a prompt, float32 on the CPU, over a number of batches of
    training rows; None unless a training is about to begin."""

    @property
    def dim(self) -> int:
        """Width of the input embeddings."""
        return self.embedding.shape[1]

    @cached_property
    def rms(self) -> float:
        """Root mean square of the embedding table: the unit in which a prompt is measured."""
        # In chunks: a float64 copy of the full table may not fit into memory.
        squares = sum(float(part.double().square().sum()) for part in torch.split(self.embedding, 8192))
        return math.sqrt(squares / self.embedding.numel())

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
        """`count` input vectors of ordinary tokens, float32, drawn without replacement until all are used."""
        ordinary = torch.tensor([i for i in range(self.embedding.shape[0]) if i not in self.special])
        draws = torch.cat(
            [torch.randperm(len(ordinary), generator=generator) for _ in range(-(-count // len(ordinary)))]
        )
        return self.embedding[ordinary[draws[:count]]].float()

    def embed(self, text: str, count: int) -> Float[Tensor, "count dim"]:
        """The vectors of `text`'s tokens, float32, repeated to `count` of them.

        Raises:
            ValueError: `text` has no tokens, or more than `count`.
        """
        ids = self.encode(text)
        if not ids:
            raise ValueError(f"initial text {text!r} has no tokens; give at least one word")
        if len(ids) > count:
            raise ValueError(
                f"the initial text {text[:60]!r} has {len(ids)} tokens and the prompt a length of {count}, so its end "
                "would be lost; raise the length, or shorten the text"
            )
        return self.embedding[torch.tensor((ids * -(-count // len(ids)))[:count])].float()


class SoftPrompt(nn.Module, ABC):
    """A soft prompt: virtual tokens, and what it does to the input's own embeddings."""

    num_matrices: int = 1
    """Matrices that `prompt()` concatenates: 1; in a deep prompt one per layer, in a decoder two (keys, values)."""
    max_input_length: int | None = None
    """Most tokens of an input, its continuation included; None: any number."""

    @final
    @property
    def is_deep(self) -> bool:
        """Whether layers have prompts of their own."""
        return self.num_matrices > 1

    @abstractmethod
    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The virtual tokens, unbatched, float32, in the host's units."""

    @abstractmethod
    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The input's own embeddings as the method changes them; most methods return `embeds` itself.

        `positions` count a row's real tokens from 0, so padding does not move a token. At padding they are meaningless,
        but never past the row's last real token.
        """

    @abstractmethod
    def fold(self) -> "Folded":
        """The prompt as plain tensors, independent of its method; PEFT calls this merging."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Learning-rate groups by name; every trainable parameter is in exactly one."""


class PromptOnly(SoftPrompt):
    """A method that only adds virtual tokens: it implements `prompt()` and nothing else."""

    @final
    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings unchanged."""
        return embeds

    @final
    def fold(self) -> "Folded":
        """The current value of the prompt."""
        return Folded(self.prompt().detach().clone())

    @final
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """One group, `prompt`."""
        return {"prompt": list(self.parameters())}


@final
class Folded(SoftPrompt):
    """A finished prompt as plain tensors: `[matrix; E + position_table[position] + input_table[id]]`.

    Args:
        matrix: the virtual tokens.
        position_table: added to the input's embeddings by a token's position.
        input_table: added to the input's embeddings by a token's id.
        beyond: what happens to a token past the position table.
        num_matrices: how many `matrix` concatenates; see `SoftPrompt.num_matrices`.

    Takes `length * dim` floats, and those of the tables. It has no parameters: folding ends training.
    """

    matrix: Tensor
    position_table: Tensor | None
    input_table: Tensor | None

    def __init__(
        self,
        matrix: Float[Tensor, "prompt dim"],
        position_table: Float[Tensor, "position dim"] | None = None,
        input_table: Float[Tensor, "vocab dim"] | None = None,
        beyond: Beyond = "none",
        num_matrices: int = 1,
    ) -> None:
        super().__init__()
        self.beyond = beyond
        self.num_matrices = num_matrices
        self.max_input_length = None if position_table is None else max_input_length(position_table, beyond)
        self.register_buffer("matrix", matrix)
        self.register_buffer("position_table", position_table)
        self.register_buffer("input_table", input_table)

    @property
    def plain(self) -> bool:
        """Whether there are no tables, as PEFT's format requires."""
        return self.position_table is None and self.input_table is None

    def prompt(self) -> Float[Tensor, "prompt dim"]:
        """The virtual tokens."""
        return self.matrix

    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings plus the tables' rows.

        Raises:
            ValueError: a position past the table, with `beyond=refuse`.
        """
        if self.position_table is not None:
            embeds = add_by_position(embeds, positions, self.position_table, self.beyond)
        if self.input_table is not None:
            embeds = embeds + self.input_table[ids].to(embeds.dtype)
        return embeds

    def fold(self) -> "Folded":
        """Itself."""
        return self

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Empty: there are no parameters."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PromptConfig(ABC):
    """A method's settings. A subclass is registered under its class name in lower case.

    A subclass must not use `@dataclass(slots=True)`, which replaces the class after it was registered.
    """

    name: ClassVar[str]
    """The method's name in `METHODS`, on the command line and on disk."""
    folds: ClassVar[str] = "prompt"
    """What a finished prompt is on disk: `prompt`, `prompt + position table` or `prompt + input table`."""

    length: int = 100
    """Virtual tokens in front of the input."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.name = cls.__name__.lower()
        known = METHODS.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"the method name {cls.name!r} is taken by {known.__module__}.{known.__qualname__}; rename the new one"
            )
        METHODS[cls.name] = cls

    def __post_init__(self) -> None:
        self.check()
        check_finite(self)

    def check(self) -> None:
        """Refuse settings that cannot work; subclasses extend it.

        Raises:
            ValueError: naming the setting, its value and what it may be.
        """
        at_least(1, length=self.length)
        for group, rate in self.rates().items():
            if not rate > 0:
                raise ValueError(f"{group}_rate is {rate}; a relative learning rate must be a positive number")

    @final
    def check_unread(self, others: str, *names: str) -> None:
        """Refuse settings that nothing reads, unless they have their defaults.

        A run records its settings, so one that changes nothing would be taken for a cause, and a sweep over it would
        train the same prompt again and again.

        Args:
            others: the settings because of which nothing reads these, for the message.
            names: the fields.

        Raises:
            ValueError: naming the first that is changed.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name} is {value!r} and has no effect with {others}; leave {field.name} out")

    @final
    def rates(self) -> dict[str, float]:
        """Each group's learning rate relative to the run's: 1 for `prompt`, a field `x_rate` for the group `x`."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_rate")}
        return {"prompt": 1.0} | {name.removesuffix("_rate"): rate for name, rate in settings.items()}

    @property
    def update_rank(self) -> int | None:
        """The setting that bounds the rank of what training adds to a frozen start; none where no setting does."""
        return None

    @classmethod
    @abstractmethod
    def published(cls) -> "PromptConfig":
        """The settings that the paper or its code used, in its own units."""

    @abstractmethod
    def build(self, host: Host, generator: torch.Generator) -> SoftPrompt:
        """A fresh prompt for `host`; equal generators give equal prompts."""

    @abstractmethod
    def count(self, dim: int) -> int:
        """Trainable parameters for a host of width `dim`, in closed form."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is its inverse."""
        return {"method": self.name, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "PromptConfig":
        """The config that `to_json` wrote as `values`.

        Raises:
            ValueError: an unknown method or setting, by name.
        """
        settings = dict(values)
        method = settings.pop("method", None)
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known are {', '.join(sorted(METHODS))}")
        config = METHODS[method]
        fields = {field.name for field in dataclasses.fields(config)}
        if unknown := sorted(set(settings) - fields):
            raise ValueError(f"{method} has no setting {', '.join(unknown)}; it has {', '.join(sorted(fields))}")
        return config(**settings)

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """A copy of the settings with `changes`."""
        return dataclasses.replace(self, **changes)


def at_least(least: int, **settings: int) -> None:
    """Refuse any setting below `least`, by name."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def max_input_length(table: Float[Tensor, "position dim"], beyond: Beyond) -> int | None:
    """Most tokens of an input for a table of offsets by position; None: any number."""
    return len(table) if beyond == "refuse" else None


def add_by_position(
    embeds: Float[Tensor, "batch seq dim"],
    positions: Int[Tensor, "batch seq"],
    table: Float[Tensor, "position dim"],
    beyond: Beyond,
) -> Float[Tensor, "batch seq dim"]:
    """`embeds + table[positions]`, in the type of `embeds`.

    Raises:
        ValueError: a position past the table, with `beyond="refuse"`.
    """
    last = table.shape[0] - 1
    if beyond == "refuse" and bool((positions > last).any()):
        raise ValueError(
            f"the input has {int(positions.max()) + 1} tokens, but the prompt has offsets for {last + 1}; "
            "shorten the input, train with more positions, or set beyond to 'none'"
        )
    offsets = table[positions.clamp(max=last)]
    return embeds + torch.where((positions <= last)[..., None], offsets, 0).to(embeds.dtype)
