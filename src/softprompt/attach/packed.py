"""Rows through a decoder in one pass without padding: behind their prompts in training, else behind kept states."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt import attention, decoder
from softprompt.attach.base import Attachment
from softprompt.attach.prefix import Prefix
from softprompt.attach.rows import Rows, row_index
from softprompt.packing import Packing
from softprompt.prompts import SoftPrompt


def packed_logits(
    attachment: Attachment,
    text: Rows,
    columns: Int[Tensor, " kept"],
    prompts: Sequence[SoftPrompt] | Prefix,
    index: Int[Tensor, " batch"] | None,
    refuse_beyond: Callable[[int], None],
    *,
    by_layer: bool,
) -> Float[Tensor, "batch kept vocab"]:
    """The logits that predict the tokens in `columns`: a token's from one place earlier, a first one's from its prompt.

    Args:
        text: with padding in front.
        prompts: of prepared ones `by_layer` alone, without gradients; a first token's logits are then any.
        refuse_beyond: told how many positions the longest row has with its prompt.
        by_layer: let `decoder.run` do what the model does.
    """
    ready = prompts if isinstance(prompts, Prefix) else None
    live = prompts.prompts if isinstance(prompts, Prefix) else prompts
    matrices = [] if ready else attachment.matrices(live)
    lengths = ready.lengths if ready else [len(matrix) for matrix in matrices]
    rows, counts = row_index(index, max(len(live), 1), text.ids), text.mask.sum(1)
    packing = Packing(lengths, counts.tolist(), rows, kept=ready.kept() if ready and lengths else None)
    refuse_beyond(int(packing.positions.max()) + 1)
    own = attachment.shifted(live, index, text.ids, text.positions())[text.mask.bool()]
    embeds = torch.cat([*(matrix.to(own.dtype) for matrix in matrices), own])
    places = (columns - 1 - (text.ids.shape[1] - counts)[:, None]).clamp(min=0 if ready else -1)
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
