"""Several prompts one behind another, as one."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.prompts.base import Folded, SoftPrompt
from softprompt.prompts.several import Several


@final
class Concatenation(Several):
    """`[P_1; P_2; ...]`: a task's prompt behind a style's, say. Parts may be folded, and then stay as they are.

    The input's embeddings pass through every part's shift in turn, so of several parts that shift by the input's
    embeddings each sees what the ones before it made.

    Raises:
        ValueError: no parts, or one that is for several layers.

    >>> both = Concatenation([Folded(torch.zeros(2, 4)), Folded(torch.ones(3, 4))])
    >>> both.prompt().shape
    torch.Size([5, 4])
    """

    def __init__(self, parts: Sequence[SoftPrompt]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("there are no prompts to concatenate; give at least one")
        if (depth := max(part.depth for part in parts)) > 1:
            raise ValueError(
                f"a prompt for {depth} layers cannot be concatenated; give prompts that enter with the input"
            )
        self.parts = nn.ModuleList(parts)
        self.max_input_length = min(
            (part.max_input_length for part in parts if part.max_input_length is not None), default=None
        )

    def shift(
        self,
        embeds: Float[Tensor, "batch seq dim"],
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq dim"]:
        """Every part's shift in turn."""
        for part in self._prompts:
            embeds = part.shift(embeds, ids, positions)
        return embeds

    def fold(self) -> Folded:
        """One folded prompt.

        Raises:
            ValueError: two parts change the input's embeddings; tables of both cannot stand for one after the other.
        """
        folded = [part.fold() for part in self._prompts]
        shifting = [part for part in folded if not part.plain]
        if len(shifting) > 1:
            raise ValueError(
                f"{len(shifting)} of the {len(folded)} concatenated prompts change the input's embeddings; "
                "only one of them can be folded, keep the others unfolded"
            )
        matrix = torch.cat([part.prompt() for part in folded])
        if not shifting:
            return Folded(matrix)
        [one] = shifting
        return Folded(matrix, one.position_table, one.input_table, one.beyond)

    @property
    def _members(self) -> nn.ModuleList:
        return self.parts
