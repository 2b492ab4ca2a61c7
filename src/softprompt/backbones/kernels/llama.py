"""Fused Llama decoder layers over packed tokens on a CPU, with a hand-written backward pass for frozen weights.

Autograd runs about two hundred small operations per layer, each a pass over memory, and stores what only a weight's
gradient would need. Here, a layer is one autograd function: matrix products accumulate directly into the residual, RoPE
and RMSNorm take three and five passes over memory, and only what the gradient of the layer's input needs is stored.
Weights of 4 bits are dequantized one matrix at a time, for each product. The last layer computes everything except keys
and values only at the positions whose logits are requested. The formulas are transformers'; rounding differs.
"""

import itertools
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.backbones.kernels import dequantize, gradient_checkpointing
from softprompt.backbones.kernels.dequantize import dequantized_weight
from softprompt.backbones.kernels.grouped import grouped_attention
from softprompt.backbones.kernels.varlen import States, VarlenLayout
from softprompt.backbones.kernels.varlen_attention import varlen_backward, varlen_forward

SUPPORTED_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""transformers' layers that consist of RMSNorm, RoPE attention and residual, then RMSNorm, SwiGLU and residual."""


@final
@dataclass(frozen=True)
class _LayerWeights:
    """The frozen weights and constants of one decoder layer, under transformers' names."""

    input_layernorm: Float[Tensor, " dim"]
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    post_attention_layernorm: Float[Tensor, " dim"]
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    variance_epsilon: float
    head_dim: int
    scaling: float

    @classmethod
    def of(cls, layer: Any) -> "_LayerWeights":
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            input_layernorm=layer.input_layernorm.weight,
            q_proj=attention.q_proj,
            k_proj=attention.k_proj,
            v_proj=attention.v_proj,
            o_proj=attention.o_proj,
            post_attention_layernorm=layer.post_attention_layernorm.weight,
            gate_proj=mlp.gate_proj,
            up_proj=mlp.up_proj,
            down_proj=mlp.down_proj,
            variance_epsilon=layer.input_layernorm.variance_epsilon,
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )


def is_supported(model: Any) -> bool:
    """Whether `run` computes what `model` does: it is on a CPU, and all its layers are of a supported kind.

    Biases are supported in the query, key and value projections only.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not layers or model.device.type != "cpu" or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        return False
    if not all(map(_is_supported_layer, layers)):
        return False
    _remember_parts(model)
    return True


_Part = tuple[dict[str, Any], str, Any]
"""The dictionary and the name at which a part of a model was, and the part."""
_parts: WeakKeyDictionary[Any, tuple[list[_Part], list[_Part]]] = WeakKeyDictionary()
"""The parts of each supported model that are not linear layers, and its linear layers."""


def is_intact(model: Any, *, linears: bool = True) -> bool:
    """Whether no part has been replaced since `is_supported`, as by an adapter, and nothing hooks in.

    `run` calls no hook and no adapter. It takes about a tenth of a millisecond, so it can be asked before each pass.

    Args:
        linears: also of the linear layers, which `llama_cached` calls as they are.
    """
    if model not in _parts:  # a copy of a model that is supported
        if not all(map(_is_supported_layer, model.model.layers)):
            return False
        _remember_parts(model)
    parts = itertools.chain(*_parts[model]) if linears else _parts[model][0]
    is_hooked = gradient_checkpointing.is_hooked
    return not is_hooked(model) and all(
        siblings.get(name) is part and not is_hooked(part) for siblings, name, part in parts
    )


def _remember_parts(model: Any) -> None:
    _parts[model] = others, linears = [(model._modules, "model", model.model)], list[_Part]()
    for parent in model.model.modules():
        for name, part in parent.named_children():
            (linears if dequantize.is_supported(part) else others).append((parent._modules, name, part))


def _is_supported_layer(layer: Any) -> bool:
    if type(layer).__name__ not in SUPPORTED_LAYERS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    probe = torch.ones(1, device=layer.input_layernorm.weight.device)
    without_bias = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(map(dequantize.is_supported, [attention.q_proj, attention.k_proj, attention.v_proj, *without_bias]))
        and all(linear.bias is None for linear in without_bias)
        and bool(mlp.act_fn(probe) == nn.functional.silu(probe))
    )


def run(
    model: Any,
    embeds: Float[Tensor, "token dim"],
    layout: VarlenLayout,
    positions: Int[Tensor, "row kept"],
) -> Float[Tensor, "row kept vocab"]:
    """The model's logits for packed tokens.

    Args:
        model: one that is supported (`is_supported`) and intact (`is_intact`), else the logits are not the model's.
        positions: the tokens of each row whose logits are returned, counted from the row's first token; -1 is the last
            token of its prompt.
    """
    decoder = model.model
    cos, sin = (table[0] for table in decoder.rotary_emb(embeds, layout.positions))
    hidden_states = embeds
    for layer in decoder.layers[:-1]:
        cached_key, cached_value = layout.next_cached_kv() or (None, None)
        hidden_states = gradient_checkpointing.checkpointed(
            _FusedDecoderLayer.apply,
            *(hidden_states, cached_key, cached_value, cos, sin, layout, _LayerWeights.of(layer)),
        )
    hidden_states = _last_layer(decoder.layers[-1], hidden_states, cos, sin, layout, positions)
    logits: Tensor = model.lm_head(decoder.norm(hidden_states))
    return logits


class _FusedDecoderLayer(torch.autograd.Function):
    """`m = h + O attention(norm(h))`, then `m + D (silu(G norm(m)) * U norm(m))`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        cached_key: Tensor | None,
        cached_value: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        layout: VarlenLayout,
        weights: _LayerWeights,
    ) -> Float[Tensor, "token dim"]:
        cached = _pair(cached_key, cached_value)
        normed, rms_inv = rms_norm(hidden_states, weights.input_layernorm, weights.variance_epsilon)
        query = apply_rotary(_split_heads(weights.q_proj(normed), weights), cos, sin)
        key = apply_rotary(_split_heads(weights.k_proj(normed), weights), cos, sin)
        value = _split_heads(weights.v_proj(normed), weights)
        attn_output, attn_weights = varlen_forward(
            query, key, value, layout, weights.scaling, cached, needs_grad=any(ctx.needs_input_grad)
        )
        mlp_input = torch.addmm(hidden_states, attn_output.flatten(1), dequantized_weight(weights.o_proj).t())
        normed, mlp_rms_inv = rms_norm(mlp_input, weights.post_attention_layernorm, weights.variance_epsilon)
        gate = normed @ dequantized_weight(weights.gate_proj).t()
        up = normed @ dequantized_weight(weights.up_proj).t()
        of_layer = (hidden_states, rms_inv, query, key, value, mlp_input, mlp_rms_inv, gate, up, cos, sin)
        ctx.save_for_backward(*of_layer, cached_key, cached_value, *attn_weights)
        ctx.layout, ctx.weights = layout, weights
        return torch.addmm(mlp_input, nn.functional.silu(gate).mul_(up), dequantized_weight(weights.down_proj).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Autocast of whoever calls backward; the forward pass had none.
        with torch.autocast(grad.device.type, enabled=False):
            return (*_FusedDecoderLayer._grads(ctx, grad), None, None, None, None)

    @staticmethod
    def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of the layer's input, and of the cached prompts' keys and values."""
        weights: _LayerWeights = ctx.weights
        hidden_states, rms_inv, query, key, value, mlp_input, mlp_rms_inv, gate, up, cos, sin, *rest = ctx.saved_tensors
        cached_key, cached_value, *attn_weights = rest
        grad_product = grad @ dequantized_weight(weights.down_proj)
        grad_up = nn.functional.silu(gate).mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        grad_normed = grad_gate @ dequantized_weight(weights.gate_proj)
        grad_normed.addmm_(grad_up, dequantized_weight(weights.up_proj))
        grad_mlp_input = _rms_norm_backward(grad_normed, mlp_input, mlp_rms_inv, weights.post_attention_layernorm)
        grad_mlp_input.add_(grad)
        grad_attn = (grad_mlp_input @ dequantized_weight(weights.o_proj)).view_as(query)
        cached = _pair(cached_key, cached_value)
        (grad_query, grad_key, grad_value), grad_cached = varlen_backward(
            query, key, value, ctx.layout, weights.scaling, attn_weights, grad_attn, cached
        )
        grad_cached_key, grad_cached_value = grad_cached or (None, None)
        if not ctx.needs_input_grad[0]:  # the first layer, after prompts that are keys and values
            return None, grad_cached_key, grad_cached_value
        # The inverse rotation.
        grad_query, grad_key = apply_rotary(grad_query, cos, -sin), apply_rotary(grad_key, cos, -sin)
        grad_normed = grad_query.flatten(1) @ dequantized_weight(weights.q_proj)
        grad_normed.addmm_(grad_key.flatten(1), dequantized_weight(weights.k_proj))
        grad_normed.addmm_(grad_value.flatten(1), dequantized_weight(weights.v_proj))
        grad_input = _rms_norm_backward(grad_normed, hidden_states, rms_inv, weights.input_layernorm)
        return grad_input.add_(grad_mlp_input), grad_cached_key, grad_cached_value


def _last_layer(
    layer: Any,
    hidden_states: Float[Tensor, "token dim"],
    cos: Tensor,
    sin: Tensor,
    layout: VarlenLayout,
    positions: Int[Tensor, "row kept"],
) -> Float[Tensor, "row kept dim"]:
    """The last layer at `positions` only, with keys and values of all tokens; differentiated by autograd."""
    weights, rows, prompts = _LayerWeights.of(layer), layout.rows, layout.prompts
    normed = layer.input_layernorm(hidden_states)
    key = apply_rotary(_split_heads(weights.k_proj(normed), weights), cos, sin)
    value = _split_heads(weights.v_proj(normed), weights)
    index = layout.token_index(positions)
    flat_index = index.flatten()
    query = apply_rotary(_split_heads(weights.q_proj(normed[flat_index]), weights), cos[flat_index], sin[flat_index])
    keys, values = rows.pad(key), rows.pad(value)
    mask = torch.arange(rows.longest, device=positions.device) <= positions[..., None]
    prefix = layout.next_cached_kv() or layout.packed_prompts(key, value)
    if prompts and prefix:
        keys, values = (
            torch.cat([prompt_kv[layout.index], row_kv], 1)
            for prompt_kv, row_kv in zip(prefix, (keys, values), strict=True)
        )
        mask = torch.cat([prompts.mask[layout.index][:, None].expand(-1, positions.shape[1], -1), mask], 2)
    attn_output = grouped_attention(
        query.view(*positions.shape, *query.shape[1:]).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        mask[:, None],
        weights.scaling,
    )
    mlp_input = hidden_states[index] + layer.self_attn.o_proj(attn_output.transpose(1, 2).flatten(2))
    result: Tensor = mlp_input + layer.mlp(layer.post_attention_layernorm(mlp_input))
    return result


def _pair(key: Tensor | None, value: Tensor | None) -> States | None:
    return None if key is None or value is None else (key, value)


def _split_heads(states: Float[Tensor, "token width"], weights: _LayerWeights) -> Float[Tensor, "token head head_dim"]:
    return states.view(len(states), -1, weights.head_dim)


def apply_rotary(
    states: Float[Tensor, "token head head_dim"], cos: Float[Tensor, "token head_dim"], sin: Tensor
) -> Float[Tensor, "token head head_dim"]:
    """RoPE: rotate the two halves of each head by the token's angle; pass `-sin` for the inverse rotation."""
    half = states.shape[-1] // 2
    rotated = states * cos[:, None]
    rotated[..., :half].addcmul_(states[..., half:], sin[:, None, :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[:, None, half:])
    return rotated


def rms_norm(
    states: Float[Tensor, "token dim"], weight: Tensor, variance_epsilon: float
) -> tuple[Float[Tensor, "token dim"], Float[Tensor, "token 1"]]:
    """RMSNorm, and the reciprocal of each token's root mean square (float32)."""
    states_f32 = states.float()
    rms_inv = torch.linalg.vecdot(states_f32, states_f32).div_(states_f32.shape[-1]).add_(variance_epsilon).rsqrt_()
    rms_inv = rms_inv[:, None]
    return (states_f32 * rms_inv).to(states.dtype).mul_(weight), rms_inv


def _rms_norm_backward(grad: Tensor, states: Tensor, rms_inv: Tensor, weight: Tensor) -> Tensor:
    """The gradient of RMSNorm's input."""
    states_f32, grad_unit = states.float(), (grad * weight).float()
    projection = torch.linalg.vecdot(grad_unit, states_f32)[:, None] * rms_inv.pow(3) / states_f32.shape[-1]
    return (grad_unit * rms_inv).addcmul_(states_f32, projection, value=-1).to(grad.dtype)
