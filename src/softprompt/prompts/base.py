"""The one interface of a prompt method: what a host, an optimiser, a saver and a flag need to know of it."""

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

# Not `Self`: the tests' shape checker decorates methods, where it cannot be resolved.
ConfigT = TypeVar("ConfigT", bound="PromptConfig")

METHODS: dict[str, type["PromptConfig"]] = {}
"""Every method by name: `METHODS["dpt"] is DPT`. Filled by subclassing `PromptConfig`."""

Beyond = Literal["refuse", "none"]
"""A token past the end of a position table: `refuse` it with an error, or give it nothing."""


@final
@dataclass(frozen=True)
class Host:
    """All that a method may know of the frozen model: no transformers type crosses this line."""

    embedding: Float[Tensor, "vocab dim"]
    """The input embedding table, detached, in the dtype that the model has it in."""
    encode: Callable[[str], list[int]]
    """Text to token ids, without special tokens."""
    label_words: tuple[str, ...] = ()
    """What the task answers with, as the model would write it; empty where there is no such list."""
    start: Float[Tensor, "prompt dim"] | None = None
    """A trained prompt to start from (a warm start); it takes the place of a method's own initial values."""
    special: frozenset[int] = frozenset()
    """Ids that stand for no text (padding, beginning of sequence); never drawn as initial values."""
    query_key: Callable[[], Float[Tensor, "dim dim"]] | None = None
    """Gives `W_q W_k^T` of the first attention, all heads together; it may refuse a model whose layout is unknown."""
    gradient: Callable[[Float[Tensor, "length dim"], int], Float[Tensor, "length dim"]] | None = None
    """Gives the mean gradient of the task's loss with regard to a prompt, float32 on the CPU, over a number of batches
    of training rows; none where no training is about to begin."""

    @property
    def dim(self) -> int:
        """Width of one input vector."""
        return self.embedding.shape[1]

    @cached_property
    def rms(self) -> float:
        """Root mean square of the embedding table: the unit in which a prompt is measured."""
        # In parts: a table may be as large as all else that is held.
        squares = sum(float(part.double().square().sum()) for part in torch.split(self.embedding, 8192))
        return math.sqrt(squares / self.embedding.numel())

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
        """`count` input vectors of ordinary tokens, float32, drawn without replacement while they last."""
        ordinary = torch.tensor([i for i in range(self.embedding.shape[0]) if i not in self.special])
        draws = torch.cat(
            [torch.randperm(len(ordinary), generator=generator) for _ in range(-(-count // len(ordinary)))]
        )
        return self.embedding[ordinary[draws[:count]]].float()

    def embed(self, text: str, count: int) -> Float[Tensor, "count dim"]:
        """The vectors of `text`'s tokens, float32, repeated or cut to `count` of them.

        Raises:
            ValueError: `text` has no tokens.
        """
        ids = self.encode(text)
        if not ids:
            raise ValueError(f"initial text {text!r} has no tokens; give at least one word")
        return self.embedding[torch.tensor((ids * -(-count // len(ids)))[:count])].float()


class SoftPrompt(nn.Module, ABC):
    """A soft prompt: vectors in front of the input, and what it does to the input's own vectors."""

    depth: int = 1
    """Layers that have vectors of their own: `prompt()` holds them one layer behind another."""
    max_input_length: int | None = None
    """Tokens that an input may have, with what it goes on with; none: any number."""

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
        """The input's own embeddings as this prompt wants them; most return `embeds` itself.

        `positions` count a row's real tokens from 0, so padding never moves a token; they are
        meaningless where a row is padding, but never past the row's last real token.
        """

    @abstractmethod
    def fold(self) -> "Folded":
        """Plain tensors that behave the same and know no method."""

    @abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Named learning-rate groups; together they hold every trainable parameter once."""


class PromptOnly(SoftPrompt):
    """A method that only puts vectors in front: `prompt()` is all that it writes."""

    @final
    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """The embeddings as they are."""
        return embeds

    @final
    def fold(self) -> "Folded":
        """The product, and nothing that made it."""
        return Folded(self.prompt().detach().clone())

    @final
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """One group for all."""
        return {"prompt": list(self.parameters())}


@final
class Folded(SoftPrompt):
    """A finished prompt as plain tensors: `[matrix; E + position_table[position] + input_table[id]]`.

    Args:
        matrix: the virtual tokens.
        position_table: added to the input's embeddings by a token's position.
        input_table: added to the input's embeddings by a token's id.
        beyond: what a token past the position table gets.
        depth: layers that the virtual tokens are of, one behind another.

    Costs `length * dim` floats, and the tables where there are any. It has no parameters: folding ends training.
    """

    matrix: Tensor
    position_table: Tensor | None
    input_table: Tensor | None

    def __init__(
        self,
        matrix: Float[Tensor, "prompt dim"],
        position_table: Float[Tensor, "place dim"] | None = None,
        input_table: Float[Tensor, "vocab dim"] | None = None,
        beyond: Beyond = "none",
        depth: int = 1,
    ) -> None:
        super().__init__()
        self.beyond = beyond
        self.depth = depth
        self.max_input_length = None if position_table is None else max_input_length(position_table, beyond)
        self.register_buffer("matrix", matrix)
        self.register_buffer("position_table", position_table)
        self.register_buffer("input_table", input_table)

    @property
    def plain(self) -> bool:
        """Whether the prompt alone says everything, as PEFT's format needs."""
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
        """Nothing is left to train."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PromptConfig(ABC):
    """A method's settings. Subclassing registers it under its class name in lower case.

    A subclass must not say `@dataclass(slots=True)`: that makes the class anew, behind the registry's back.
    """

    name: ClassVar[str]
    """The method's name in `METHODS`, on the command line and on disk."""
    folds: ClassVar[str] = "prompt"
    """What a finished prompt is on disk: `prompt`, or `prompt + position table`, `prompt + input table`."""

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

    def check(self) -> None:
        """Refuse settings that cannot work; a subclass extends it.

        Raises:
            ValueError: naming the setting, its value and what it may be.
        """
        at_least(1, length=self.length)
        for group, rate in self.rates().items():
            if not 0 < rate < float("inf"):
                raise ValueError(f"{group}_rate is {rate}; a relative learning rate must be a positive number")

    @final
    def rates(self) -> dict[str, float]:
        """Each group's learning rate relative to the run's: 1 for `prompt`, a field `x_rate` for the group `x`."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_rate")}
        return {"prompt": 1.0} | {name.removesuffix("_rate"): rate for name, rate in named.items()}

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
        """The config that wrote `values`.

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
        """The same settings but for `changes`."""
        return dataclasses.replace(self, **changes)


def at_least(least: int, **settings: int) -> None:
    """Refuse any setting below `least`, by name."""
    for name, value in settings.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def max_input_length(table: Float[Tensor, "place dim"], beyond: Beyond) -> int | None:
    """Tokens that an input may have where `table` has an offset for each place."""
    return len(table) if beyond == "refuse" else None


def add_by_position(
    embeds: Float[Tensor, "batch seq dim"],
    positions: Int[Tensor, "batch seq"],
    table: Float[Tensor, "place dim"],
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
    rows = table[positions.clamp(max=last)]
    return embeds + torch.where((positions <= last)[..., None], rows, 0).to(embeds.dtype)
