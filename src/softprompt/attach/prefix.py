"""Prompts in front of a decoder as what its layers keep of them: keys and values, computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from softprompt.attach.base import Prepared
from softprompt.packing import States
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class Prefix(Prepared):
    """Several prompts' keys and values, computed once, shorter prompts padded at their end."""

    prompts: Sequence[SoftPrompt]
    layers: tuple[tuple[Float[Tensor, "row head prompt head_dim"], Float[Tensor, "row head prompt head_dim"]], ...]
    """Keys and values of each layer, a row a prompt."""
    mask: Int[Tensor, "row prompt"]
    """1 where a prompt has a vector; `prompt` is 0 for a model without a prompt."""
    logits: Float[Tensor, "row vocab"] | None
    """What the model expects right after each prompt; none without a prompt."""

    @property
    def lengths(self) -> list[int]:
        """Vectors of each prompt."""
        return self.mask.sum(1).tolist() if self.prompts else []

    def kept(self) -> list[States]:
        """The same keys and values as packed rows see them."""
        return [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in self.layers]

    def cache(self, rows: Int[Tensor, " batch"]) -> DynamicCache:
        """What a batch continues from, each row from the prompt that `rows` says."""
        cache = DynamicCache()
        cache.layers = [Growing(_per_row(key, rows), _per_row(value, rows)) for key, value in self.layers]
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


ROOM = 64
"""Tokens that there is place for before keys and values are copied again."""


@final
class Growing(DynamicLayer):
    """A layer's keys and values that leave room: a further token is written behind them.

    transformers' own layer copies all that it has for each token; this one does where gradients are wanted.
    """

    _room: tuple[Tensor, Tensor] | None = None
    _front: Tensor | None = None
    """The keys, the first places of the room, as they were left: unless something else was put in their stead."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, with the new ones behind."""
        if key_states.shape[-2] > 1 or torch.is_grad_enabled():
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        length = self.keys.shape[-2]
        if self._room is None or self._front is not self.keys or length == self._room[0].shape[-2]:
            self._room = _roomy(self.keys), _roomy(self.values)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, length : length + 1] = states
        self.keys, self.values = (room[:, :, : length + 1] for room in self._room)
        self._front = self.keys
        return self.keys, self.values


def _roomy(states: Tensor) -> Tensor:
    return nn.functional.pad(states, (0, 0, 0, ROOM))
