"""A batch that a decoder is in the middle of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from softprompt.models.base import Index
from softprompt.prompts import SoftPrompt


class DecodeState(NamedTuple):
    """A batch in the middle of being read."""

    cache: Any
    mask: Int[Tensor, "batch total"]
    """Of all so far."""
    logits: Float[Tensor, "batch kept vocab"]
    """Those asked for."""
    next_position: Int[Tensor, "batch 1"]
    """Of each row's next token in its text."""
    prompts: Sequence[SoftPrompt]
    rows: Index
    """Which of the prompts each row has."""
