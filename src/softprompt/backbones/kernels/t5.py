"""A T5 encoder over packed tokens: rows attend to themselves and their prompt, a prompt attends only to itself.

A prompt's states therefore depend on no row, and are computed once for all rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.backbones.kernels import gradient_checkpointing
from softprompt.backbones.kernels.grouped import grouped_attention
from softprompt.backbones.kernels.varlen import PackedSequences, VarlenLayout

SUPPORTED_STACKS = ("T5Stack", "MT5Stack")
"""transformers' encoders with one relative position bias that all layers share."""


def is_supported(encoder: Any) -> bool:
    """Whether `run` computes what `encoder` does."""
    return type(encoder).__name__ in SUPPORTED_STACKS and not encoder.is_decoder


def run(encoder: Any, embeds: Float[Tensor, "token dim"], layout: VarlenLayout) -> Float[Tensor, "token dim"]:
    """The encoder's last hidden states for packed tokens; a row's positions continue its prompt's.

    Raises:
        ValueError: the encoder is in training mode, with its dropout; or a hook is on a part that is not called.
    """
    if encoder.training:
        raise ValueError(
            "prompts with prompt_attention=self run without the model's own dropout; turn dropout off, or use "
            "prompt_attention=full"
        )
    attentions = [part for block in encoder.block for part in (block, block.layer[0], block.layer[0].SelfAttention)]
    if hooked := next((part for part in (encoder, *attentions) if gradient_checkpointing.is_hooked(part)), None):
        raise ValueError(
            f"a {type(hooked).__name__} of the encoder has a hook or another forward, which prompts with "
            "prompt_attention=self would skip; remove it, or use prompt_attention=full"
        )
    first_attention = encoder.block[0].layer[0].SelfAttention
    biases_and_masks = [(_position_bias(first_attention, layout, part), layout.mask(part)) for part in layout.parts]
    hidden_states = embeds
    for block in encoder.block:
        # Recomputing a block would record its keys and values, or take the cached ones, a second time.
        if layout.record_kv or layout.prefix_is_cached:
            hidden_states = _block(block, hidden_states, layout, biases_and_masks)
        else:
            hidden_states = gradient_checkpointing.checkpointed(_block, block, hidden_states, layout, biases_and_masks)
    result: Tensor = encoder.final_layer_norm(hidden_states)
    return result


def _block(
    block: Any,
    hidden_states: Float[Tensor, "token dim"],
    layout: VarlenLayout,
    biases_and_masks: Sequence[tuple[Tensor, Tensor]],
) -> Float[Tensor, "token dim"]:
    """One T5 block.

    Args:
        biases_and_masks: the position bias and attention mask of each part of the layout.
    """
    self_attention, feed_forward = block.layer
    normed = self_attention.layer_norm(hidden_states)
    attention = self_attention.SelfAttention
    query, key, value = (
        projection(normed).unflatten(1, (attention.n_heads, -1))
        for projection in (attention.q, attention.k, attention.v)
    )
    if layout.record_kv:
        layout.record(key, value)
    attn_outputs = [
        part.unpad(
            grouped_attention(
                part.pad(query).transpose(1, 2),
                keys.transpose(1, 2),
                values.transpose(1, 2),
                mask,
                attention.scaling,
                bias,
            ).transpose(1, 2)
        )
        for (part, keys, values), (bias, mask) in zip(layout.parts_with_kv(key, value), biases_and_masks, strict=True)
    ]
    result: Tensor = feed_forward(hidden_states + attention.o(torch.cat(attn_outputs).flatten(1)))
    return result


def _position_bias(attention: Any, layout: VarlenLayout, part: PackedSequences) -> Tensor:
    """The relative position bias of each query and visible key, one for all rows if prompts are equally long."""
    query_positions = torch.arange(part.longest, device=part.device)[None]
    key_positions = query_positions
    if layout.prompts is not None and part is not layout.prompts:
        lengths = torch.tensor(layout.prompts.lengths, device=part.device)
        lengths = lengths[:1] if layout.prompts.equal_lengths else lengths[layout.index]
        query_positions = query_positions + lengths[:, None]
        prompt_positions = torch.arange(layout.prompts.longest, device=part.device).expand(len(lengths), -1)
        key_positions = torch.cat([prompt_positions, query_positions], 1)
    buckets = attention._relative_position_bucket(
        key_positions[:, None] - query_positions[..., None],
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).permute(0, 3, 1, 2)
