"""Prompts in the row itself: `[lead; prompt; rest; pads]`, each row contiguous.

Where prompt positions see some of the text (an encoder's see all of it), nothing of a prompt but its vectors can be
computed ahead. Encoders count positions by index (T5's relative bias, BART's and BERT's tables), so every pad stands
behind the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softprompt.models.base import Prepared, PromptedModel
from softprompt.models.padding import Rows, row_index
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class PromptEmbeddings(Prepared):
    """Several prompts' virtual tokens, computed once, one prompt behind the other."""

    prompts: Sequence[SoftPrompt]
    vectors: Float[Tensor, "vector dim"]
    """float32."""
    starts: Int[Tensor, " row"]
    """Where each prompt begins."""
    lengths: Int[Tensor, " row"]
    """How long each is; one of 0 for a model without a prompt."""


class RowsWithPrompts(NamedTuple):
    """Rows with their prompts in them, ready for a model."""

    embeds: Float[Tensor, "batch total dim"]
    mask: Int[Tensor, "batch total"]
    own: Bool[Tensor, "batch total"]
    """Where the text's own tokens are."""

    def padded_in_front(self) -> "RowsWithPrompts":
        """The same with every pad in front of its row, as a decoder goes on from."""
        order = self.mask.argsort(dim=1, stable=True)
        embeds = self.embeds.gather(1, order[..., None].expand_as(self.embeds))
        return RowsWithPrompts(embeds, self.mask.gather(1, order), self.own.gather(1, order))


def prompt_embeddings(prompted: PromptedModel, prompts: Sequence[SoftPrompt]) -> PromptEmbeddings:
    """The prompts' virtual tokens, for any number of later calls."""
    device = prompted.backbone.device
    found = prompted.prompt_embeddings(prompts)
    lengths = torch.tensor([len(matrix) for matrix in found] or [0], device=device)
    empty = torch.zeros(0, prompted.backbone.dim, device=device)
    return PromptEmbeddings(list(prompts), torch.cat([empty, *found]), lengths.cumsum(0) - lengths, lengths)


def resolve(prompted: PromptedModel, prompts: Sequence[SoftPrompt] | Prepared | None) -> PromptEmbeddings:
    """`prompts` made ready, or the attachment's own.

    Raises:
        ValueError: they were prepared for an architecture of another kind.
    """
    prepared = prompted.resolve(prompts)
    if not isinstance(prepared, PromptEmbeddings):
        raise ValueError(f"{type(prepared).__name__} was prepared for another architecture; prepare the prompts again")
    return prepared


def insert_prompts(
    prompted: PromptedModel,
    prepared: PromptEmbeddings,
    index: Int[Tensor, " batch"] | None,
    text: Rows,
    lead: int | Int[Tensor, "batch 1"],
    limit: int | None,
) -> RowsWithPrompts:
    """The rows with each its prompt behind its first `lead` tokens.

    Args:
        text: with padding behind.
        lead: tokens that stay in front of the prompt, of all rows or of each.
        limit: positions that the model has.
    """
    batch, seq = text.ids.shape
    rows = row_index(index, max(len(prepared.prompts), 1), text.ids)
    lengths, starts = prepared.lengths[rows][:, None], prepared.starts[rows][:, None]
    totals = text.mask.sum(1, keepdim=True) + lengths
    longest = int(totals.max())
    prompted.refuse_long(longest, limit)
    column = torch.arange(longest, device=text.ids.device)
    in_prompt = (column >= lead) & (column < lead + lengths)
    of_text = torch.where(column < lead, column, column - lengths).clamp(0, seq - 1)
    of_text = of_text + seq * torch.arange(batch, device=text.ids.device)[:, None]
    places = torch.where(in_prompt, batch * seq + starts + column - lead, of_text)
    embeds = prompted.shifted(prepared.prompts, index, text.ids, text.positions())
    # A lookup in float32: its gradient sums over the rows before anything is rounded to the backbone's dtype.
    table = torch.cat([embeds.reshape(batch * seq, -1).float(), prepared.vectors])
    real = column < totals
    laid_out = nn.functional.embedding(places, table).to(embeds.dtype)
    return RowsWithPrompts(laid_out, real.long(), real & ~in_prompt)
