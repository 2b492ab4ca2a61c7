"""Prompts and rows through a decoder in one pass without padding, for training: everything is computed at one time."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt import attention, decoder
from softprompt.attach.base import Attachment
from softprompt.attach.rows import Rows, row_index
from softprompt.packing import Packing
from softprompt.prompts import SoftPrompt


def packed_logits(
    attachment: Attachment,
    text: Rows,
    columns: Int[Tensor, " kept"],
    prompts: Sequence[SoftPrompt],
    index: Int[Tensor, " batch"] | None,
    refuse_beyond: Callable[[int], None],
    *,
    by_layer: bool,
) -> Float[Tensor, "batch kept vocab"]:
    """The logits that predict the tokens in `columns`: a token's from one place earlier, a first one's from its prompt.

    Args:
        text: with padding in front.
        refuse_beyond: told how many positions the longest row has with its prompt.
        by_layer: let `decoder.run` do what the model does.
    """
    matrices = attachment.matrices(prompts)
    rows, counts = row_index(index, max(len(matrices), 1), text.ids), text.mask.sum(1)
    packing = Packing([len(matrix) for matrix in matrices], counts.tolist(), rows)
    refuse_beyond(int(packing.positions.max()) + 1)
    own = attachment.shifted(prompts, index, text.ids, text.positions())[text.mask.bool()]
    embeds = torch.cat([*(matrix.to(own.dtype) for matrix in matrices), own])
    places = (columns - 1 - (text.ids.shape[1] - counts)[:, None]).clamp(min=-1)
    model = attachment.backbone.model
    if by_layer and not model.training:  # it knows no dropout
        return decoder.run(model, embeds, packing, places)
    keep = packing.at(places)
    output = model(
        inputs_embeds=embeds[None],
        attention_mask=attention.everything(own.device),
        position_ids=packing.positions,
        use_cache=False,
        logits_to_keep=keep.flatten(),
        packing=packing,
    )
    logits: Tensor = output.logits[0].unflatten(0, keep.shape)
    return logits
