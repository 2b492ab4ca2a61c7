"""Llama layers over a batch's KV cache on a CPU, without gradients: a text after its prompt, or one more token per row.

transformers runs a hundred operations per layer, whose overhead is most of the time for a token. Here a layer consists
of its seven matrix products, which read the weights once, and a few small operations between them. The query heads that
share a key-value head are the queries of one attention call, so keys and values are not repeated. The formulas are
transformers'; rounding differs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softprompt.backbones.kernels.llama import apply_rotary, rms_norm
from softprompt.backbones.kernels.packed_linear import PackedWeights


@torch.no_grad()
def run(
    model: Any,
    embeds: Float[Tensor, "row token dim"],
    cache: Any,
    mask: Int[Tensor, "row total"],
    keep: Int[Tensor, " kept"] | slice,
    packed: PackedWeights | None = None,
) -> Float[Tensor, "row kept vocab"]:
    """The model's logits after further tokens of each row; the cache grows by their columns.

    Args:
        model: one that `llama.is_supported` accepts.
        embeds: each row's next tokens. What is computed for padding among them is finite and meaningless.
        cache: a transformers cache with the keys and values so far.
        mask: 1 at the cache's real columns, the new ones included; a token's position is the number of those before it.
        keep: the new columns after which logits are computed.
        packed: weights to multiply with instead of the model's own.
    """
    decoder, (rows, tokens, _) = model.model, embeds.shape
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - tokens :]
    cos, sin = (table.flatten(0, 1) for table in decoder.rotary_emb(embeds, positions))
    visible = _visible(mask, tokens)
    states = embeds.flatten(0, 1)
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        normed = _normed(states, layer.input_layernorm)
        projected = _linear(normed, (attention.q_proj, attention.k_proj, attention.v_proj), packed)
        query, key, value = (part.view(len(states), -1, attention.head_dim) for part in projected)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        added = (part.view(rows, tokens, *part.shape[1:]).transpose(1, 2) for part in (key, value))
        keys, values = cache.update(*added, number)
        # [row, kv head, group x token, head_dim]: the heads of a group attend to the same keys.
        grouped = query.view(rows, tokens, keys.shape[1], -1, attention.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        output = nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=_per_group(visible, grouped.shape[2] // tokens), scale=attention.scaling
        )
        by_group = output.view(rows, keys.shape[1], -1, tokens, output.shape[-1])
        output = by_group.permute(0, 3, 1, 2, 4).reshape(len(states), -1)
        states = states + _linear(output, (attention.o_proj,), packed)[0]
        gate, up = _linear(_normed(states, layer.post_attention_layernorm), (mlp.gate_proj, mlp.up_proj), packed)
        states = states + _linear(nn.functional.silu(gate) * up, (mlp.down_proj,), packed)[0]
    outputs = states.view(rows, tokens, -1)[:, keep]
    [logits] = _linear(_normed(outputs.flatten(0, 1), decoder.norm), (model.lm_head,), packed)
    return logits.view(*outputs.shape[:2], -1)


def _visible(mask: Int[Tensor, "row total"], tokens: int) -> Bool[Tensor, "row 1 token total"] | None:
    """The columns that each of the last `tokens` attends to; None for all."""
    if tokens == 1 and bool(mask.all()):
        return None
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = columns[mask.shape[1] - tokens :, None]
    # Padding may attend to nothing; torch's kernel then gives 0, where a softmax by itself would be NaN.
    return (mask.bool()[:, None] & (columns <= last))[:, None]


def _per_group(
    visible: Bool[Tensor, "row 1 token total"] | None, heads: int
) -> Bool[Tensor, "row 1 queries total"] | None:
    return None if visible is None else visible.repeat(1, 1, heads, 1)


def _linear(
    inputs: Float[Tensor, "token in"], layers: tuple[Any, ...], packed: PackedWeights | None
) -> Sequence[Float[Tensor, "token _"]]:
    """The output of each of the linear layers, which read the same inputs."""
    if packed is None:
        return [layer(inputs) for layer in layers]
    return torch.split(packed(inputs, *layers), [layer.out_features for layer in layers], 1)


def _normed(states: Float[Tensor, "token dim"], norm: Any) -> Float[Tensor, "token dim"]:
    return rms_norm(states, norm.weight, norm.variance_epsilon)[0]
