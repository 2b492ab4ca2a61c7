"""How a batch of rows is laid out: masks checked, padding moved to one side, a prompt for each row."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


class Rows(NamedTuple):
    """Rows laid out with all padding on one side, and where they came from."""

    ids: Int[Tensor, "batch seq"]
    mask: Int[Tensor, "batch seq"]
    order: Int[Tensor, "batch seq"]

    def positions(self) -> Int[Tensor, "batch seq"]:
        """Each token's place in its own text, from 0."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def first(self) -> Bool[Tensor, "batch seq"]:
        """Where each row's first token is."""
        return (self.mask.cumsum(1) == 1) & (self.mask == 1)

    def until(self, column: int) -> "Rows":
        """The rows without what stands in `column` and behind it; whole where that would leave a row empty."""
        if not bool(self.mask[:, :column].any(1).all()):
            return self
        return Rows(*(part[:, :column] for part in self))

    def beginning(self, most: int) -> int:
        """How many of their first tokens all rows have in common, `most` at most; padding stands in front."""
        if most < 1:
            return 0
        first = self.ids.gather(1, self.leading(most))
        return int((first == first[:1]).all(0).long().cumprod(0).sum())

    def leading(self, count: int) -> Int[Tensor, "batch count"]:
        """The columns of each row's first `count` tokens; padding stands in front."""
        starts = self.ids.shape[1] - self.mask.sum(1, keepdim=True)
        return starts + torch.arange(count, device=self.ids.device)


def align_padding(
    ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"], pads: Literal["front", "behind"] = "front"
) -> Rows:
    """The rows with their padding in front or behind, and columns of padding alone cut off.

    What stands at padding becomes 0, an id that every model has: a tokenizer's own may be beyond the embedding table.
    """
    widest = int(mask.sum(1).max())
    if pads == "front":
        order = mask.argsort(dim=1, stable=True)[:, mask.shape[1] - widest :]
    else:
        order = (1 - mask).argsort(dim=1, stable=True)[:, :widest]
    mask = mask.gather(1, order)
    return Rows(ids.gather(1, order).masked_fill(mask == 0, 0), mask, order)


def pad_batch(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
    """Rows of tokens as one batch, shorter ones padded behind, and its mask."""
    given = [torch.tensor(list(row), dtype=torch.long, device=device) for row in rows]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in given], True)
    return nn.utils.rnn.pad_sequence(given, True), mask


def row_index(index: Int[Tensor, " batch"] | None, count: int, ids: Int[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    """Which of `count` prompts each row takes.

    Raises:
        ValueError: several prompts and no index, or an index that is out of range or of another length.
    """
    batch = ids.shape[0]
    if index is None:
        if count > 1:
            raise ValueError(f"{count} prompts are given and no index; say which prompt each of the {batch} rows takes")
        return torch.zeros(batch, dtype=torch.long, device=ids.device)
    if index.shape != (batch,) or int(index.min()) < 0 or int(index.max()) >= max(count, 1):
        raise ValueError(f"index is {index.tolist()}; it needs {batch} numbers from 0 to {count - 1}, one a row")
    return index.to(ids.device)


def checked_mask(
    ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch seq"]:
    """The attention mask as integers, all ones where there is none.

    Raises:
        ValueError: another shape than the ids', values other than 0 and 1, or a row without a token.
    """
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; they must be equal")
    mask = mask.long()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds other values than 0 and 1; give 1 for tokens and 0 for padding")
    if empty := (mask.sum(1) == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"rows {empty} have no token; leave empty rows out")
    return mask
