"""Rows through a decoder in one pass without padding: behind their prompts in training, else behind kept states."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones.kernels import attention, llama
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.models.base import PromptedModel
from softprompt.models.kv_prefix import Prefix
from softprompt.models.padding import Rows, row_index
from softprompt.prompts import SoftPrompt


def varlen_logits(
    prompted: PromptedModel,
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
        by_layer: let `llama.run` do what the model does.
    """
    ready = prompts if isinstance(prompts, Prefix) else None
    live = prompts.prompts if isinstance(prompts, Prefix) else prompts
    prompt_embeddings = [] if ready else prompted.prompt_embeddings(live)
    lengths = ready.lengths if ready else [len(matrix) for matrix in prompt_embeddings]
    every = len(ready.mask) if ready else max(len(live), 1)
    rows, counts, positions = row_index(index, every, text.ids), text.mask.sum(1), text.positions()
    places = (columns - 1 - (text.ids.shape[1] - counts)[:, None]).clamp(min=0 if ready else -1)
    model = prompted.backbone.model
    if ready:
        positions = positions + ready.read[rows][:, None]
    own = prompted.shifted(live, rows, text.ids, positions)
    begun = 0
    if not ready and len(counts) > every and not model.training:  # the model's dropout is each row's own
        most = text.beginning(min(int(places.min()) + 1, int(counts.min()) - 1))
        begun, prompt_embeddings = _with_beginning(prompt_embeddings, own, text, rows, most)
    own = own[(text.mask.cumsum(1) > begun) & (text.mask == 1)]
    if begun:
        lengths, counts, places = [len(matrix) for matrix in prompt_embeddings], counts - begun, places - begun
    layout = VarlenLayout(lengths, counts.tolist(), rows, cached_kv=ready.as_varlen() if ready and lengths else None)
    refuse_beyond(int(layout.positions.max()) + 1)
    embeds = torch.cat([*(matrix.to(own.dtype) for matrix in prompt_embeddings), own])
    if by_layer and not model.training:  # it knows no dropout
        return llama.run(model, embeds, layout, places)
    keep = layout.token_index(places)
    output = model(
        inputs_embeds=embeds[None],
        attention_mask=attention.varlen_mask(own.device),
        position_ids=layout.positions,
        use_cache=False,
        logits_to_keep=keep.flatten(),
        layout=layout,
    )
    logits: Tensor = output.logits[0].unflatten(0, keep.shape)
    return logits


def _with_beginning(
    prompt_embeddings: Sequence[Float[Tensor, "_ dim"]],
    own: Float[Tensor, "batch seq dim"],
    text: Rows,
    rows: Int[Tensor, " batch"],
    count: int,
) -> tuple[int, list[Float[Tensor, "_ dim"]]]:
    """`count` and each prompt with the tokens behind it in which all rows begin alike; or 0 and the prompts.

    What a causal model makes of those is the same in every row of a prompt, so they run once, as the prompt does; but
    not where a method shifts them by chance (ADePT's dropout), each row's by its own.
    """
    if not count:
        return 0, list(prompt_embeddings)
    found = own.gather(1, text.leading(count)[..., None].expand(-1, -1, own.shape[-1]))
    fronts = list(prompt_embeddings) or [found[0, :0]]
    members = [(rows == which).nonzero()[:, 0] for which in range(len(fronts))]
    if any(bool((found[some] != found[some[:1]]).any()) for some in members):
        return 0, list(prompt_embeddings)
    return count, [
        torch.cat([front.to(own.dtype), found[some[0]]]) if len(some) else front
        for front, some in zip(fronts, members, strict=True)
    ]
