"""Prompts in front of a decoder as their keys and values in every layer, computed once.

The tokens that texts begin with can follow a prompt and be part of its prefix.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from softprompt.backbones.kernels.varlen import States
from softprompt.models.inputs import PreparedPrompts
from softprompt.models.padding import padding_order
from softprompt.prompts import SoftPrompt

LayerKV = tuple[Float[Tensor, "head _ _"], Float[Tensor, "head _ _"]]
"""One layer's keys and values of one prefix, `[head, column, head_dim]`."""


@final
@dataclass(frozen=True)
class KVPrefix:
    """One prompt's keys and values, without padding: the memory that serving one more prompt takes."""

    layers: tuple[LayerKV, ...]
    token_ids: tuple[int, ...] = ()
    """The tokens that texts begin with whose keys and values follow the prompt's."""

    @classmethod
    def copy_of(
        cls, layers: Iterable[tuple[Tensor, Tensor]], row: int, length: int, token_ids: Sequence[int] = ()
    ) -> "KVPrefix":
        """The first `length` columns of one row of batched layers, in memory of their own."""
        copies = ((keys[row, :, :length].clone(), values[row, :, :length].clone()) for keys, values in layers)
        return cls(tuple(copies), tuple(token_ids))

    @property
    def length(self) -> int:
        """Columns: virtual tokens, and the tokens after them."""
        return int(self.layers[0][0].shape[1])

    @property
    def nbytes(self) -> int:
        """Memory that the keys and values take."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    @property
    def is_finite(self) -> bool:
        """Whether no key or value is infinite or NaN."""
        return all(bool(states.isfinite().all()) for layer in self.layers for states in layer)


@final
@dataclass(frozen=True)
class KVPrefixBatch(PreparedPrompts):
    """Several prefixes as one batch, padded on the right, and the logits after each."""

    prompts: Sequence[SoftPrompt]
    """The prompt of each prefix; a prompt with several shared prefixes appears once for each. Empty for a bare
    model."""
    layers: tuple[
        tuple[Float[Tensor, "prefix head column head_dim"], Float[Tensor, "prefix head column value_dim"]], ...
    ]
    """Keys and values of each layer; empty for a bare model."""
    mask: Int[Tensor, "prefix column"]
    """1 where a prefix has keys and values; one prefix without columns for a bare model."""
    logits: Float[Tensor, "prefix vocab"] | None
    """What the model predicts after each prefix; None for a bare model."""
    token_counts: Int[Tensor, " prefix"]
    """Tokens of a text that follow the prompt in each prefix."""

    @classmethod
    def from_cache(
        cls,
        prompts: Sequence[SoftPrompt],
        cache: DynamicCache,
        mask: Int[Tensor, "prefix total"],
        logits: Float[Tensor, "prefix vocab"],
        token_counts: Int[Tensor, " prefix"],
    ) -> "KVPrefixBatch":
        """What a pass left in its cache, with all padding moved to the right."""
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        if bool((mask.diff(dim=1) <= 0).all()):  # it is there already
            return cls(prompts, layers, mask, logits, token_counts)
        order = padding_order(mask, "right")
        columns = order[:, None, :, None]

        def aligned(states: Tensor) -> Tensor:
            return states.gather(2, columns.expand(-1, states.shape[1], -1, states.shape[3]))

        layers = tuple((aligned(keys), aligned(values)) for keys, values in layers)
        return cls(prompts, layers, mask.gather(1, order), logits, token_counts)

    @property
    def lengths(self) -> list[int]:
        """Columns of each prefix; empty for a bare model."""
        return self.mask.sum(1).tolist() if self.layers else []

    def select(self, prefix: int, length: int) -> KVPrefix:
        """The first `length` columns of one prefix, copied."""
        return KVPrefix.copy_of(self.layers, prefix, length)

    def as_varlen(self) -> list[States]:
        """The keys and values in the layout that packed rows attend to."""
        return [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in self.layers]

    def cache(self, index: Int[Tensor, " batch"]) -> DynamicCache:
        """The cache that a batch continues from, with the prefix of each of its rows."""
        cache = DynamicCache()
        cache.layers = [_layer(_per_row(key, index), _per_row(value, index)) for key, value in self.layers]
        return cache

    def with_first_logits(
        self,
        logits: Float[Tensor, "batch kept vocab"],
        is_first: Bool[Tensor, "batch kept"],
        index: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch kept vocab"]:
        """`logits`, with those that predict a row's first token taken from the end of its prefix."""
        if self.logits is None or not bool(is_first.any()):
            return logits
        return torch.where(is_first[..., None], self.logits[index][:, None], logits)


def _per_row(
    states: Float[Tensor, "prefix head column head_dim"], index: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head prompt head_dim"]:
    # A single prefix is expanded, not copied.
    return states.expand(len(index), -1, -1, -1) if len(states) == 1 else states[index]


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
