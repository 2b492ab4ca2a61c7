"""A preallocated cache layer of a running batch: new keys and values are written into it, and nothing is copied."""

from typing import Any, final

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

ROOM = 64
"""Columns that a buffer gets beyond what it needs, so that it is not reallocated at every token."""


@final
class KVBuffer(CacheLayerMixin):
    """A buffer in which new keys and values are written after `length`, and count only once `length` grows.

    A pass that fails halfway therefore changes nothing, and can be repeated with fewer rows.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffer exists."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another column."""
        return self.length == self.keys.shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **others: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the given ones last."""
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next pass attends to, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns that count."""
        return self.length

    def get_max_length(self) -> int:
        """No limit: a full buffer is reallocated."""
        return -1

    @classmethod
    def copy_of(cls, layer: Any, room: int) -> "KVBuffer":
        """A buffer with what a cache's layer holds, and `room` columns for more."""
        length, buffers = layer.get_seq_length(), []
        for states in (layer.keys, layer.values):
            rows, heads, _, width = states.shape
            # Zeros: a masked column's weight is 0, and 0 times what happens to be in memory may be NaN.
            buffers.append(states.new_zeros(rows, heads, length + room, width))
            buffers[-1][:, :, :length] = states[:, :, :length]
        return cls(buffers[0], buffers[1], length)
