"""A deep prompt of a decoder: trained keys and values in every layer, which no token produced.

A matrix for the keys and one for the values of each layer, `[length, heads * head_dim]`, concatenated as
`[K_1; V_1; K_2; V_2; ...]`. Keys are those that attention reads, after rotary positions 0 to length - 1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache

from softprompt.backbones import Backbone
from softprompt.models.kv_prefix import KVPrefixBatch
from softprompt.models.padding import length_mask
from softprompt.prompts import SoftPrompt
from softprompt.types import PromptPosition


def any_deep(prompts: Sequence[SoftPrompt]) -> bool:
    """Whether one of the prompts is deep."""
    return any(prompt.is_deep for prompt in prompts)


def check_deep(
    backbone: Backbone, prompts: Sequence[SoftPrompt], inline: bool, prompt_position: PromptPosition
) -> None:
    """Check that deep prompts can be prefixes of a decoder's rows.

    Args:
        prompts: those of one call, of which one is deep.
        inline: whether the model runs prompts in every row.
        prompt_position: where its prompts are.

    Raises:
        ValueError: they cannot, or there are shallow prompts beside them.
    """
    if inline:
        where = "" if prompt_position == "prefix" else f" at prompt_position {prompt_position!r}"
        raise ValueError(
            f"the prompt is deep, but {backbone.source}{where} runs prompts in every row; train a shallow prompt, or a "
            "deep one with prompt_position 'prefix' on a model that takes explicit positions"
        )
    if not all(prompt.is_deep for prompt in prompts):
        raise ValueError("deep and shallow prompts are in one call; run each kind on its own")


def deep_prefixes(backbone: Backbone, prompts: Sequence[SoftPrompt], vectors: Sequence[Tensor]) -> KVPrefixBatch:
    """Deep prompts as a batch of prefixes; gradients flow to `vectors`. Nothing predicts a row's first token.

    Args:
        vectors: each prompt's `prompt()`.
    """
    layout = backbone.kv_layout
    assert layout is not None
    shape = (layout.num_layers, 2, -1, layout.num_kv_heads, layout.head_dim)
    by_layer = [matrix.to(backbone.device, backbone.dtype).view(shape) for matrix in vectors]
    lengths = torch.tensor([states.shape[2] for states in by_layer], device=backbone.device)
    # [layer, key or value, prompt, column, head, head_dim]
    padded = torch.nn.utils.rnn.pad_sequence([states.permute(2, 0, 1, 3, 4) for states in by_layer], True)
    states = padded.permute(2, 3, 0, 4, 1, 5)
    layers = tuple((keys, values) for keys, values in states)
    mask = length_mask(lengths, int(lengths.max()))
    return KVPrefixBatch(list(prompts), layers, mask, None, torch.zeros_like(lengths))


@torch.no_grad()
def as_deep(backbone: Backbone, prompt: Float[Tensor, "length dim"]) -> Float[Tensor, "matrix_x_length width"]:
    """The keys and values of virtual tokens in front of a text: a deep prompt that does the same, float32, on the CPU.

    Exact for every token of a text but the first, which virtual tokens predict and a deep prompt does not.
    """
    embeds = prompt.to(backbone.device, backbone.dtype)[None]
    cache = DynamicCache()
    backbone.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
    parts = [states[0].transpose(0, 1).flatten(1) for layer in cache.layers for states in (layer.keys, layer.values)]
    return torch.cat(parts).float().cpu()
