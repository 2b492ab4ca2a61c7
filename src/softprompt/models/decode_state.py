"""The state of a decoder's batch between two steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from softprompt.models.inputs import Index
from softprompt.models.kv_buffer import KVBuffer
from softprompt.prompts import SoftPrompt


class DecodeState(NamedTuple):
    """The cache of a batch, the logits of its last pass, and what its next tokens need."""

    cache: Any
    mask: Int[Tensor, "batch total"]
    """1 at the cache's real columns."""
    logits: Float[Tensor, "batch kept vocab"]
    """The logits that the last pass was asked for."""
    next_position: Int[Tensor, "batch 1"]
    """The position of each row's next token in its own text."""
    prompts: Sequence[SoftPrompt]
    prompt_index: Index
    """The prompt of each row."""

    def with_room(self, columns: int) -> "DecodeState":
        """The same state with room for further tokens: keys and values are copied to buffers where they are full."""
        layers = self.cache.layers
        if isinstance(layers[0], KVBuffer) and not layers[0].is_full:
            return self
        return self._replace(cache=Cache(layers=[KVBuffer.copy_of(layer, columns) for layer in layers]))

    def after(self, mask: Int[Tensor, "batch total"], logits: Float[Tensor, "batch kept vocab"]) -> "DecodeState":
        """The state after a pass that has added columns to the cache; `mask` has them."""
        for layer in self.cache.layers:
            if isinstance(layer, KVBuffer):
                layer.length = mask.shape[1]
        next_position = self.next_position + (mask.shape[1] - self.mask.shape[1])
        return self._replace(mask=mask, logits=logits, next_position=next_position)
