"""Prompts in front of a decoder as what its layers keep of them: keys and values, computed once.

A beginning that texts share can stand behind a prompt and be part of what is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from softprompt.backbones.kernels.varlen import States
from softprompt.models.base import Prepared
from softprompt.models.padding import align_padding
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class Prefix(Prepared):
    """Several prompts' keys and values, computed once, shorter ones padded at their end."""

    prompts: Sequence[SoftPrompt]
    """A row's each, and so one several times where several beginnings stand behind it; none for a bare model."""
    layers: tuple[tuple[Float[Tensor, "row head prompt head_dim"], Float[Tensor, "row head prompt value_dim"]], ...]
    """Keys and values of each layer, a row a prompt with its beginning; no layers where there is neither."""
    mask: Int[Tensor, "row prompt"]
    """1 where a row has keys and values; one row of none for a model without a prompt."""
    logits: Float[Tensor, "row vocab"] | None
    """What the model expects right after each; none where there is nothing before the text."""
    read: Int[Tensor, " row"]
    """Tokens of a text's beginning that stand behind each prompt and are in the keys and values too."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[SoftPrompt],
        cache: DynamicCache,
        mask: Int[Tensor, "row total"],
        logits: Float[Tensor, "row vocab"],
        read: Int[Tensor, " row"],
    ) -> "Prefix":
        """What a pass left in its cache, with all padding moved to the end."""
        layers = tuple((layer.keys, layer.values) for layer in cache.layers)
        if bool((mask.diff(dim=1) <= 0).all()):  # it stands there already
            return cls(prompts, layers, mask, logits, read)
        rows = align_padding(mask, mask, pads="behind")
        at = rows.order[:, None, :, None]

        def moved(states: Tensor) -> Tensor:
            return states.gather(2, at.expand(-1, states.shape[1], -1, states.shape[3]))

        layers = tuple((moved(keys), moved(values)) for keys, values in layers)
        return cls(prompts, layers, rows.mask, logits, read)

    @property
    def lengths(self) -> list[int]:
        """Vectors and tokens of each; none at all where nothing stands before the text."""
        return self.mask.sum(1).tolist() if self.layers else []

    def as_varlen(self) -> list[States]:
        """The same keys and values as packed rows see them."""
        return [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in self.layers]

    def cache(self, rows: Int[Tensor, " batch"]) -> DynamicCache:
        """What a batch continues from, each row from the prompt that `rows` says."""
        cache = DynamicCache()
        cache.layers = [_layer(_per_row(key, rows), _per_row(value, rows)) for key, value in self.layers]
        return cache

    def predicting(
        self,
        logits: Float[Tensor, "batch kept vocab"],
        first: Bool[Tensor, "batch kept"],
        rows: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch kept vocab"]:
        """`logits` with those that predict a row's `first` token taken from the end of its prompt."""
        if self.logits is None or not bool(first.any()):
            return logits
        return torch.where(first[..., None], self.logits[rows][:, None], logits)


def _per_row(
    states: Float[Tensor, "row head prompt head_dim"], rows: Int[Tensor, " batch"]
) -> Float[Tensor, "batch head prompt head_dim"]:
    # One prompt is expanded, not copied.
    return states.expand(len(rows), -1, -1, -1) if len(states) == 1 else states[rows]


def _layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
