"""How a batch of rows is padded, and padding moved to one side."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

PaddingSide = Literal["left", "right"]
"""transformers' `padding_side`: padding before the tokens, or after them."""


class Rows(NamedTuple):
    """Token rows whose padding is all on one side."""

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    order: Int[Tensor, "batch seq"]
    """The original column of each token."""

    def positions(self) -> Int[Tensor, "batch seq"]:
        """Each token's position in its own text, from 0."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def is_first_token(self) -> Bool[Tensor, "batch seq"]:
        """True at each row's first token."""
        return (self.mask.cumsum(1) == 1) & (self.mask == 1)

    def before(self, column: int) -> "Rows":
        """The rows up to but without `column`; unchanged where that would leave a row empty."""
        if not bool(self.mask[:, :column].any(1).all()):
            return self
        return Rows(*(part[:, :column] for part in self))

    def common_prefix_length(self, limit: int) -> int:
        """How many first tokens all rows share, at most `limit`; needs padding on the left."""
        if limit < 1:
            return 0
        first = self.ids.gather(1, self.first_columns(limit))
        return int((first == first[:1]).all(0).long().cumprod(0).sum())

    def first_columns(self, count: int) -> Int[Tensor, "batch count"]:
        """The columns of each row's first `count` tokens; needs padding on the left."""
        starts = self.ids.shape[1] - self.mask.sum(1, keepdim=True)
        return starts + torch.arange(count, device=self.ids.device)


def padding_order(mask: Int[Tensor, "batch seq"], side: PaddingSide) -> Int[Tensor, "batch longest"]:
    """The columns of each row in the order that moves its padding to `side`, without columns of padding alone."""
    longest = int(mask.sum(1).max())
    if side == "left":
        return mask.argsort(dim=1, stable=True)[:, mask.shape[1] - longest :]
    return (1 - mask).argsort(dim=1, stable=True)[:, :longest]


def align_padding(ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"], side: PaddingSide = "left") -> Rows:
    """The rows with all padding on `side`, without columns of padding alone.

    Padding gets the id 0, which every model embeds: a tokenizer's padding id may lie beyond the embedding table.
    """
    order = padding_order(mask, side)
    mask = mask.gather(1, order)
    return Rows(ids.gather(1, order).masked_fill(mask == 0, 0), mask, order)


def pad_batch(
    rows: Sequence[Sequence[int]], device: torch.device, side: PaddingSide = "right", pad_id: int = 0
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
    """Rows of token ids as one batch padded on `side`, and its mask."""
    tensors = [torch.tensor(list(row), dtype=torch.long) for row in rows]
    ids = nn.utils.rnn.pad_sequence(tensors, True, pad_id, side)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in tensors], True, 0, side)
    return ids.to(device), mask.to(device)


def length_mask(lengths: Int[Tensor, " batch"], width: int, side: PaddingSide = "right") -> Int[Tensor, "batch width"]:
    """The mask of rows of these lengths in `width` columns, padded on `side`."""
    columns = torch.arange(width, device=lengths.device)
    real = columns >= width - lengths[:, None] if side == "left" else columns < lengths[:, None]
    return real.long()
