"""A batch that a decoder is in the middle of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from softprompt.models.inputs import Index
from softprompt.prompts import SoftPrompt


class DecodeState(NamedTuple):
    """The cache of a batch, and what its next tokens need."""

    cache: Any
    mask: Int[Tensor, "batch total"]
    """1 at the cache's real columns."""
    logits: Float[Tensor, "batch kept vocab"]
    """The logits that the last pass was asked for."""
    next_position: Int[Tensor, "batch 1"]
    """The position of each row's next token in its own text."""
    prompts: Sequence[SoftPrompt]
    rows: Index
    """The prompt of each row."""
