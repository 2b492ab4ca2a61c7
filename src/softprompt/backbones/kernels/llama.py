"""A Llama decoder's layers over packed tokens on a CPU, with a backward pass written for frozen weights.

Autograd runs some two hundred small operations a layer, one pass over memory each, and keeps what only a weight's
gradient would need. Here a layer is one step: products go straight into the residual, rotations and norms take three
and five passes, and what is kept is what the gradient of the layer's input needs. Weights of 4 bits are made whole one
matrix at a time, for each product again. The last layer does all but its keys and values at the places alone whose
logits are wanted. Same formulas as transformers' layers; roundings differ.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softprompt.backbones.kernels import gradient_checkpointing
from softprompt.backbones.kernels.attention import grouped_attention, varlen_backward, varlen_forward
from softprompt.backbones.kernels.dequantize import has_matrix, matrix
from softprompt.backbones.kernels.varlen import VarlenLayout

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
"""transformers' layers that are RMSNorm, rotary attention, RMSNorm, SwiGLU, each added to its input."""


@final
@dataclass(frozen=True)
class _Weights:
    """A layer's frozen weights."""

    before: Float[Tensor, " dim"]
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    between: Float[Tensor, " dim"]
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    epsilon: float
    head_dim: int
    scale: float

    @classmethod
    def of(cls, layer: Any) -> "_Weights":
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            layer.input_layernorm.weight,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
            layer.post_attention_layernorm.weight,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            layer.input_layernorm.variance_epsilon,
            attention.head_dim,
            attention.scaling,
        )


def is_supported(model: Any) -> bool:
    """Whether `run` does what `model` does: all its layers are of a known kind, without biases where none are added."""
    body = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    if not layers or model.device.type != "cpu" or not isinstance(getattr(model, "lm_head", None), nn.Linear):
        return False
    return all(
        type(layer).__name__ in LAYERS
        and all(has_matrix(module) for module in _linear(layer))
        and all(module.bias is None for module in _linear(layer)[3:])
        and layer.mlp.act_fn(torch.ones(1)) == nn.functional.silu(torch.ones(1))
        for layer in layers
    )


def _linear(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    first = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*first, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def run(
    model: Any,
    embeds: Float[Tensor, "token dim"],
    layout: VarlenLayout,
    places: Int[Tensor, "row kept"],
) -> Float[Tensor, "row kept vocab"]:
    """Logits of packed tokens.

    Args:
        places: which of each row's own tokens they are wanted for; -1: the last of its prompt.
    """
    body = model.model
    cosine, sine = (part[0] for part in body.rotary_emb(embeds, layout.positions))
    hidden = embeds
    for layer in body.layers[:-1]:
        hidden = gradient_checkpointing.through(_Layer.apply, hidden, cosine, sine, layout, _Weights.of(layer))
    wanted = _last(_Weights.of(body.layers[-1]), body.layers[-1], hidden, cosine, sine, layout, places)
    logits: Tensor = model.lm_head(body.norm(wanted))
    return logits


class _Layer(torch.autograd.Function):
    """`h + O(attention(norm(h)))`, then `m + D(silu(G norm(m)) * U norm(m))`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, cosine: Tensor, sine: Tensor, layout: VarlenLayout, weights: _Weights
    ) -> Float[Tensor, "token dim"]:
        normed, unit = _norm(hidden, weights.before, weights.epsilon)
        query = _rotated(_heads(weights.query(normed), weights), cosine, sine)
        key = _rotated(_heads(weights.key(normed), weights), cosine, sine)
        value = _heads(weights.value(normed), weights)
        trains = ctx.needs_input_grad[0]
        found, kept = varlen_forward(query, key, value, layout, weights.scale, differentiated=trains)
        middle = torch.addmm(hidden, found.flatten(1), matrix(weights.out).t())
        normed, middle_unit = _norm(middle, weights.between, weights.epsilon)
        gate, up = normed @ matrix(weights.gate).t(), normed @ matrix(weights.up).t()
        ctx.save_for_backward(hidden, unit, query, key, value, middle, middle_unit, gate, up, cosine, sine, *kept)
        ctx.layout, ctx.weights = layout, weights
        return torch.addmm(middle, nn.functional.silu(gate).mul_(up), matrix(weights.down).t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights: _Weights = ctx.weights
        with torch.autocast(grad.device.type, enabled=False):  # of whoever calls backward; the forward pass had none
            return _Layer._gradient(ctx, weights, grad)

    @staticmethod
    def _gradient(ctx: Any, weights: _Weights, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, unit, query, key, value, middle, middle_unit, gate, up, cosine, sine, *kept = ctx.saved_tensors
        product = grad @ matrix(weights.down)
        up_grad = nn.functional.silu(gate).mul_(product)
        gate_grad = torch.ops.aten.silu_backward(product.mul_(up), gate)
        inner = (gate_grad @ matrix(weights.gate)).addmm_(up_grad, matrix(weights.up))
        middle_grad = _norm_gradient(inner, middle, middle_unit, weights.between).add_(grad)
        found = (middle_grad @ matrix(weights.out)).view_as(query)
        grads = varlen_backward(query, key, value, ctx.layout, weights.scale, kept, found)
        turned = (_rotated(grads[0], cosine, -sine), _rotated(grads[1], cosine, -sine), grads[2])
        inner = turned[0].flatten(1) @ matrix(weights.query)
        inner.addmm_(turned[1].flatten(1), matrix(weights.key)).addmm_(turned[2].flatten(1), matrix(weights.value))
        return _norm_gradient(inner, hidden, unit, weights.before).add_(middle_grad), None, None, None, None


def _last(
    weights: _Weights,
    layer: Any,
    hidden: Float[Tensor, "token dim"],
    cosine: Tensor,
    sine: Tensor,
    layout: VarlenLayout,
    places: Int[Tensor, "row kept"],
) -> Float[Tensor, "row kept dim"]:
    """The last layer at `places`, with keys and values from all tokens."""
    rows, prompts = layout.rows, layout.prompts
    normed = layer.input_layernorm(hidden)
    key = _rotated(_heads(weights.key(normed), weights), cosine, sine)
    value = _heads(weights.value(normed), weights)
    at = layout.at(places)
    query = _rotated(_heads(weights.query(normed[at.flatten()]), weights), cosine[at.flatten()], sine[at.flatten()])
    seen, mask = [rows.padded(key), rows.padded(value)], torch.arange(rows.longest) <= places[..., None]
    before = layout.prefix_kv(key, value)
    if prompts and before:
        seen = [torch.cat([one[layout.index], own], 1) for one, own in zip(before, seen, strict=True)]
        mask = torch.cat([prompts.real[layout.index][:, None].expand(-1, places.shape[1], -1), mask], 2)
    found = grouped_attention(
        query.view(*places.shape, *query.shape[1:]).transpose(1, 2),
        seen[0].transpose(1, 2),
        seen[1].transpose(1, 2),
        mask[:, None],
        weights.scale,
    )
    middle = hidden[at] + layer.self_attn.o_proj(found.transpose(1, 2).flatten(2))
    result: Tensor = middle + layer.mlp(layer.post_attention_layernorm(middle))
    return result


def _heads(states: Float[Tensor, "token width"], weights: _Weights) -> Float[Tensor, "token head head_dim"]:
    return states.view(len(states), -1, weights.head_dim)


def _rotated(
    states: Float[Tensor, "token head head_dim"], cosine: Float[Tensor, "token head_dim"], sine: Tensor
) -> Float[Tensor, "token head head_dim"]:
    """Each pair of a head's two halves turned by its angle; by the opposite one if `sine` is negated."""
    half = states.shape[-1] // 2
    turned = states * cosine[:, None]
    turned[..., :half].addcmul_(states[..., half:], sine[:, None, :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sine[:, None, half:])
    return turned


def _norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Float[Tensor, "token one"]]:
    """RMSNorm, and one over each token's root mean square, float32."""
    wide = states.float()
    unit = torch.linalg.vecdot(wide, wide).div_(wide.shape[-1]).add_(epsilon).rsqrt_()[:, None]
    return (wide * unit).to(states.dtype).mul_(weight), unit


def _norm_gradient(grad: Tensor, states: Tensor, unit: Tensor, weight: Tensor) -> Tensor:
    wide, inner = states.float(), (grad * weight).float()
    along = torch.linalg.vecdot(inner, wide)[:, None] * unit.pow(3) / wide.shape[-1]
    return (inner * unit).addcmul_(wide, along, value=-1).to(grad.dtype)
