"""The sizes of a decoder's cache: the keys and values of one token in each layer."""

from dataclasses import dataclass
from typing import Any, final

import torch
from transformers.cache_utils import DynamicCache


@final
@dataclass(frozen=True)
class KVLayout:
    """Keys and values of equal size in every layer."""

    num_layers: int
    num_kv_heads: int
    """Key-value heads, of which grouped-query attention has fewer than query heads."""
    head_dim: int

    @property
    def width(self) -> int:
        """Entries of one token's keys, or of its values, in one layer."""
        return self.num_kv_heads * self.head_dim


@torch.no_grad()
def kv_layout(model: Any) -> KVLayout | None:
    """The sizes of what one token leaves in the cache; None where layers or keys and values differ (as in MLA)."""
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    states = [(layer.keys, layer.values) for layer in cache.layers]
    if any(keys is None or keys.shape != states[0][0].shape or values.shape != keys.shape for keys, values in states):
        return None
    _, heads, _, head_dim = states[0][0].shape
    return KVLayout(num_layers=len(states), num_kv_heads=heads, head_dim=head_dim)
