"""Decode one more token for each row of a batch through Llama layers on a CPU, with a dozen operations per layer.

transformers runs a hundred, whose overhead is most of the time for one token. Here a layer consists of its seven matrix
products, which read the weights once, and a few small operations between them. The query heads that share a key-value
head are the queries of one attention call, so keys and values are not repeated. The formulas are transformers';
rounding differs.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.backbones.kernels.dequantize import dequantized_weight
from softprompt.backbones.kernels.packed_linear import PackedWeights


@torch.no_grad()
def decode(
    model: Any,
    embeds: Float[Tensor, "row dim"],
    cache_layers: Any,
    mask: Int[Tensor, "row total"],
    packed: PackedWeights | None = None,
) -> Float[Tensor, "row vocab"]:
    """The model's logits after one token a row; the cache grows by a column.

    Args:
        model: one that `llama.is_supported` accepts.
        embeds: each row's next token.
        cache_layers: for each layer a transformers cache layer with the keys and values so far.
        mask: 1 at the cache's real columns, the new one included; their number is the new token's position.
        packed: weights to multiply with instead of the model's own.
    """
    decoder = model.model
    cos, sin = decoder.rotary_emb(embeds, mask.sum(1, keepdim=True) - 1)
    half = cos.shape[-1] // 2
    cos, sin = cos.to(embeds.dtype), sin[..., :half].to(embeds.dtype)
    visible = None if bool(mask.all()) else mask.bool()[:, None, None]
    states = embeds
    for layer, cache in zip(decoder.layers, cache_layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        normed = _rms_norm(states, layer.input_layernorm)
        heads = (len(states), -1, attention.head_dim)
        query = _rotated(_linear(normed, attention.q_proj, packed).view(heads), cos, sin, half)
        key = _rotated(_linear(normed, attention.k_proj, packed).view(heads), cos, sin, half)
        value = _linear(normed, attention.v_proj, packed).view(heads)
        keys, values = cache.update(key[:, :, None], value[:, :, None])
        grouped = query.view(len(states), keys.shape[1], -1, attention.head_dim)
        output = nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=visible, scale=attention.scaling
        )
        states = _matmul(output.reshape(len(states), -1), attention.o_proj, packed, states)
        normed = _rms_norm(states, layer.post_attention_layernorm)
        gate = _matmul(normed, mlp.gate_proj, packed)
        product = nn.functional.silu(gate, inplace=True).mul_(_matmul(normed, mlp.up_proj, packed))
        states = _matmul(product, mlp.down_proj, packed, states)
    return _linear(_rms_norm(states, decoder.norm), model.lm_head, packed)


def _linear(inputs: Float[Tensor, "row in"], linear: Any, packed: PackedWeights | None) -> Float[Tensor, "row out"]:
    """`linear(inputs)`."""
    if packed is None:
        output: Tensor = linear(inputs)
        return output
    output = packed[linear](inputs)
    return output if linear.bias is None else output.add_(linear.bias)


def _matmul(
    inputs: Float[Tensor, "row in"],
    linear: Any,
    packed: PackedWeights | None,
    addend: Float[Tensor, "row out"] | None = None,
) -> Float[Tensor, "row out"]:
    """`linear(inputs)` without a bias, added to `addend`."""
    if packed is not None:
        output = packed[linear](inputs)
        return output if addend is None else output.add_(addend)
    weight = dequantized_weight(linear).t()
    return inputs @ weight if addend is None else torch.addmm(addend, inputs, weight)


def _rms_norm(states: Float[Tensor, "row dim"], norm: Any) -> Float[Tensor, "row dim"]:
    wide = states.float()
    mean_square = torch.linalg.vecdot(wide, wide)[:, None].div_(wide.shape[-1])
    return (wide * mean_square.add_(norm.variance_epsilon).rsqrt_()).to(states.dtype).mul_(norm.weight)


def _rotated(
    states: Float[Tensor, "row head head_dim"], cos: Float[Tensor, "row 1 head_dim"], sin: Tensor, half: int
) -> Float[Tensor, "row head head_dim"]:
    """RoPE, as `llama._apply_rotary`."""
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin, value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin)
    return rotated
