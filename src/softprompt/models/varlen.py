"""Rows of a decoder in one packed pass without padding: after live prompts, or after keys and values."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softprompt.backbones.kernels import attention, llama
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.models.base import PromptedModel
from softprompt.models.input_checks import checked_index
from softprompt.models.kv_prefix import KVPrefixBatch
from softprompt.models.padding import Rows
from softprompt.prompts import SoftPrompt


def varlen_logits(
    prompted: PromptedModel,
    text: Rows,
    columns: Int[Tensor, " kept"],
    prompts: Sequence[SoftPrompt] | KVPrefixBatch,
    index: Int[Tensor, " batch"] | None,
    check_length: Callable[[int], None],
    *,
    fused: bool,
) -> Float[Tensor, "batch kept vocab"]:
    """The logits that predict the tokens in `columns`: from the position before, or for a first token from its prompt.

    Args:
        text: padded on the left.
        prompts: a KVPrefixBatch needs `fused`; gradients flow to its keys and values, and the logits for first tokens
            are meaningless.
        check_length: called with the positions of the longest row and its prompt.
        fused: run the layers through `llama.run` and not through the model.
    """
    cached = prompts if isinstance(prompts, KVPrefixBatch) else None
    live = prompts.prompts if isinstance(prompts, KVPrefixBatch) else prompts
    vectors = [] if cached else prompted.prompt_embeddings(live)
    prompt_lengths = cached.lengths if cached else [len(matrix) for matrix in vectors]
    prompt_count = len(cached.mask) if cached else max(len(live), 1)
    index, counts, positions = checked_index(index, prompt_count, text.ids), text.mask.sum(1), text.positions()
    predicting = (columns - 1 - (text.ids.shape[1] - counts)[:, None]).clamp(min=0 if cached else -1)
    model = prompted.backbone.model
    if cached:
        positions = positions + cached.token_counts[index][:, None]
    embeds = prompted.token_embeddings(live, index, text.ids, positions)
    shared = 0
    if not cached and len(counts) > prompt_count and not model.training:  # dropout differs from row to row
        limit = text.common_prefix_length(min(int(predicting.min()) + 1, int(counts.min()) - 1))
        shared, vectors = _with_common_prefix(vectors, embeds, text, index, limit)
    packed = embeds[(text.mask.cumsum(1) > shared) & (text.mask == 1)]
    if shared:
        prompt_lengths, counts, predicting = [len(matrix) for matrix in vectors], counts - shared, predicting - shared
    layout = VarlenLayout(
        prompt_lengths, counts.tolist(), index, cached_kv=cached.as_varlen() if cached and prompt_lengths else None
    )
    check_length(int(layout.positions.max()) + 1)
    packed = torch.cat([*(matrix.to(packed.dtype) for matrix in vectors), packed])
    if fused:
        return llama.run(model, packed, layout, predicting)
    keep = layout.token_index(predicting)
    output = model(
        inputs_embeds=packed[None],
        attention_mask=attention.varlen_mask(packed.device),
        position_ids=layout.positions,
        use_cache=False,
        logits_to_keep=keep.flatten(),
        layout=layout,
    )
    logits: Tensor = output.logits[0].unflatten(0, keep.shape)
    return logits


def _with_common_prefix(
    vectors: Sequence[Float[Tensor, "_ dim"]],
    embeds: Float[Tensor, "batch seq dim"],
    text: Rows,
    index: Int[Tensor, " batch"],
    count: int,
) -> tuple[int, list[Float[Tensor, "_ dim"]]]:
    """`count` and each prompt followed by the first `count` tokens that all rows share; or 0 and the prompts.

    A causal model computes the same states for those tokens in every row of a prompt, so they run once, as the prompt
    does. Not where a method shifts them at random (ADePT's dropout), differently in each row.
    """
    if not count:
        return 0, list(vectors)
    first = embeds.gather(1, text.first_columns(count)[..., None].expand(-1, -1, embeds.shape[-1]))
    prompts = list(vectors) or [first[0, :0]]
    members = [(index == number).nonzero()[:, 0] for number in range(len(prompts))]
    if any(bool((first[member] != first[member[:1]]).any()) for member in members):
        return 0, list(vectors)
    return count, [
        torch.cat([prompt.to(embeds.dtype), first[member[0]]]) if len(member) else prompt
        for prompt, member in zip(prompts, members, strict=True)
    ]
