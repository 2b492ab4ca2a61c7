"""Prompts inside each row: `[lead; prompt; rest; padding]`, every row contiguous.

Where prompt positions attend to the text (an encoder's attend to all of it), only a prompt's vectors can be computed
ahead. Encoders count positions by column (T5's relative bias, BART's and BERT's tables), so all padding is on the
right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softprompt.models.base import PromptedModel
from softprompt.models.input_checks import checked_index
from softprompt.models.inputs import PreparedPrompts
from softprompt.models.padding import Rows, padding_order
from softprompt.prompts import SoftPrompt


@final
@dataclass(frozen=True)
class PromptEmbeddings(PreparedPrompts):
    """Several prompts' virtual tokens, concatenated."""

    prompts: Sequence[SoftPrompt]
    vectors: Float[Tensor, "vector dim"]
    """float32."""
    starts: Int[Tensor, " prompt"]
    """The first vector of each prompt."""
    lengths: Int[Tensor, " prompt"]
    """The length of each prompt; a single 0 for a model without a prompt."""

    @classmethod
    def compute(cls, prompted: PromptedModel, prompts: Sequence[SoftPrompt]) -> "PromptEmbeddings":
        """The prompts' virtual tokens, for any number of later calls."""
        device = prompted.backbone.device
        vectors = prompted.prompt_embeddings(prompts)
        lengths = torch.tensor([len(matrix) for matrix in vectors] or [0], device=device)
        empty = torch.zeros(0, prompted.backbone.dim, device=device)
        return cls(list(prompts), torch.cat([empty, *vectors]), lengths.cumsum(0) - lengths, lengths)


class RowsWithPrompts(NamedTuple):
    """Rows with their prompts in them, ready for a model."""

    embeds: Float[Tensor, "batch total dim"]
    mask: Int[Tensor, "batch total"]
    is_text: Bool[Tensor, "batch total"]
    """True at the text's own tokens."""

    def left_padded(self) -> "RowsWithPrompts":
        """The same rows with all padding on the left, as a decoder continues them."""
        order = padding_order(self.mask, "left")
        embeds = self.embeds.gather(1, order[..., None].expand(-1, -1, self.embeds.shape[-1]))
        return RowsWithPrompts(embeds, self.mask.gather(1, order), self.is_text.gather(1, order))


def insert_prompts(
    prompted: PromptedModel,
    prepared: PromptEmbeddings,
    index: Int[Tensor, " batch"] | None,
    text: Rows,
    lead: int | Int[Tensor, "batch 1"],
    limit: int | None,
) -> RowsWithPrompts:
    """Insert each row's prompt after its first `lead` tokens.

    Args:
        text: padded on the right.
        lead: tokens before the prompt, of all rows or of each.
        limit: the model's positions.
    """
    batch, seq = text.ids.shape
    index = checked_index(index, max(len(prepared.prompts), 1), text.ids)
    lengths, starts = prepared.lengths[index][:, None], prepared.starts[index][:, None]
    totals = text.mask.sum(1, keepdim=True) + lengths
    longest = int(totals.max())
    prompted.check_length(longest, limit)
    column = torch.arange(longest, device=text.ids.device)
    in_prompt = (column >= lead) & (column < lead + lengths)
    of_text = torch.where(column < lead, column, column - lengths).clamp(0, seq - 1)
    of_text = of_text + seq * torch.arange(batch, device=text.ids.device)[:, None]
    sources = torch.where(in_prompt, batch * seq + starts + column - lead, of_text)
    embeds = prompted.token_embeddings(prepared.prompts, index, text.ids, text.positions())
    # A lookup in float32: its gradient sums over the rows before anything is rounded to the backbone's dtype.
    table = torch.cat([embeds.reshape(batch * seq, -1).float(), prepared.vectors])
    real = column < totals
    laid_out = nn.functional.embedding(sources, table).to(embeds.dtype)
    return RowsWithPrompts(laid_out, real.long(), real & ~in_prompt)
