"""A T5 encoder's layers over packed tokens: rows see themselves and their prompt, a prompt sees itself alone.

So a prompt's states do not depend on any row, and run once for all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.kernels import gradient_checkpointing
from softprompt.backbones.kernels.attention import grouped_attention
from softprompt.backbones.kernels.varlen import Block, VarlenLayout

STACKS = ("T5Stack", "MT5Stack")
"""transformers' encoders of one relative bias that all layers share."""


def is_supported(encoder: Any) -> bool:
    """Whether `run` does what `encoder` does."""
    return type(encoder).__name__ in STACKS and not encoder.is_decoder


def run(encoder: Any, embeds: Float[Tensor, "token dim"], layout: VarlenLayout) -> Float[Tensor, "token dim"]:
    """The encoder's last states of packed tokens; a row's places are counted behind its prompt's.

    Raises:
        ValueError: the encoder is in training mode, with its dropout.
    """
    if encoder.training:
        raise ValueError(
            "isolated prompts run without the model's own dropout; leave dropout off, or prompt_attention=full"
        )
    first = encoder.block[0].layer[0].SelfAttention
    layouts = [(_bias(first, layout, block), layout.visible(block)) for block in layout.blocks]
    hidden = embeds
    for layer in encoder.block:
        if layout.record_kv or layout.prefix_is_cached:  # which is noted once a layer
            hidden = _through(layer, hidden, layout, layouts)
        else:
            hidden = gradient_checkpointing.through(_through, layer, hidden, layout, layouts)
    result: Tensor = encoder.final_layer_norm(hidden)
    return result


def _through(
    layer: Any, hidden: Float[Tensor, "token dim"], layout: VarlenLayout, layouts: Sequence[tuple[Tensor, Tensor]]
) -> Float[Tensor, "token dim"]:
    """One layer.

    Args:
        layouts: bias and mask of each block.
    """
    about, feed_forward = layer.layer
    normed = about.layer_norm(hidden)
    attention = about.SelfAttention
    query, key, value = (
        part(normed).unflatten(1, (attention.n_heads, -1)) for part in (attention.q, attention.k, attention.v)
    )
    if layout.record_kv:
        layout.record(key, value)
    found = [
        block.flat(
            grouped_attention(
                block.padded(query).transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                mask,
                attention.scaling,
                bias,
            ).transpose(1, 2)
        )
        for (block, keys, values), (bias, mask) in zip(layout.views(key, value), layouts, strict=True)
    ]
    result: Tensor = feed_forward(hidden + attention.o(torch.cat(found).flatten(1)))
    return result


def _bias(attention: Any, layout: VarlenLayout, block: Block) -> Tensor:
    """The relative bias of each query and key that it can see: one for all sequences whose prompts are equally long."""
    queries = torch.arange(block.longest, device=block.device)[None]
    keys = queries
    if layout.prompts is not None and block is not layout.prompts:
        lengths = torch.tensor(layout.prompts.lengths, device=block.device)
        lengths = lengths[:1] if layout.prompts.even else lengths[layout.index]
        queries = queries + lengths[:, None]
        of_prompt = torch.arange(layout.prompts.longest, device=block.device).expand(len(lengths), -1)
        keys = torch.cat([of_prompt, queries], 1)
    buckets = attention._relative_position_bucket(
        keys[:, None] - queries[..., None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
