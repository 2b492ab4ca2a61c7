"""A batch that a decoder is in the middle of."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from softprompt.attach.base import Index
from softprompt.prompts import SoftPrompt


class State(NamedTuple):
    """A batch in the middle of being read."""

    cache: Any
    mask: Int[Tensor, "batch total"]
    """Of all so far."""
    logits: Float[Tensor, "batch kept vocab"]
    """Those asked for."""
    place: Int[Tensor, "batch 1"]
    """Of each row's next token in its text."""
    prompts: Sequence[SoftPrompt]
    rows: Index
    """Which of the prompts each row has."""

    def repeated(self, count: int) -> "State":
        """Each row `count` times, in the same cache and without its logits."""
        self.cache.batch_repeat_interleave(count)
        rows = None if self.rows is None else self.rows.repeat_interleave(count, 0)
        mask, place = (part.repeat_interleave(count, 0) for part in (self.mask, self.place))
        return self._replace(mask=mask, logits=self.logits[:0], place=place, rows=rows)
