"""Attention over packed tokens: it keeps the sequences apart and lets each row attend to its prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softprompt.backbones.kernels.grouped import (
    attention_backward,
    attention_weights,
    saves_weights,
    to_autocast_dtype,
)
from softprompt.backbones.kernels.varlen import PackedSequences, States, VarlenLayout

_PartGrad = tuple[Float[Tensor, "_ head width"], Float[Tensor, "prompt longest head width"] | None]
"""A gradient of a part's tokens (or of all packed ones), and one of padded prompts."""


def varlen_attention(
    query: Float[Tensor, "1 head token head_dim"],
    key: Float[Tensor, "1 kv_head token head_dim"],
    value: Float[Tensor, "1 kv_head token value_dim"],
    layout: VarlenLayout,
    scale: float,
) -> Float[Tensor, "1 token head value_dim"]:
    """Attention over packed tokens as grouped matrix products; a row attends to its prompt and to itself."""
    by_token = (states[0].transpose(0, 1) for states in to_autocast_dtype(query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        attn_output: Tensor = _VarlenAttention.apply(*by_token, layout, scale)  # type: ignore[no-untyped-call]
    return attn_output[None]


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        attn_output, saved_weights = varlen_forward(query, key, value, layout, scale, needs_grad=needs_grad)
        ctx.save_for_backward(query, key, value, *saved_weights)
        ctx.layout, ctx.scale = layout, scale
        return attn_output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved_weights = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grads, _ = varlen_backward(query, key, value, ctx.layout, ctx.scale, saved_weights, grad)
        return (*grads, None, None)


def varlen_forward(
    query: Float[Tensor, "token head head_dim"],
    key: Float[Tensor, "token kv_head head_dim"],
    value: Float[Tensor, "token kv_head value_dim"],
    layout: VarlenLayout,
    scale: float,
    cached: States | None = None,
    *,
    needs_grad: bool,
) -> tuple[Float[Tensor, "token head value_dim"], list[Tensor | None]]:
    """Attention over packed tokens, and each part's weights (None where they are not saved).

    Args:
        cached: `layout.next_cached_kv()` of this layer.
        needs_grad: there will be a backward pass, which uses the weights. A part whose weights are not saved runs
            through torch's fused kernel, whose forward pass is faster.
    """
    outputs, saved_weights = list[Tensor](), list[Tensor | None]()
    prefix = cached or layout.packed_prompts(key, value)
    for part in layout.parts:
        prefix_key, prefix_value = prefix if prefix is not None and part is layout.rows else (None, None)
        keys = part.longest + (0 if prefix_key is None else prefix_key.shape[1])
        if not needs_grad or not saves_weights(keys):
            outputs.append(_part_sdpa(query, *layout.visible_kv(part, key, value, prefix), layout, part, scale))
            saved_weights.append(None)
            continue
        weights = _part_weights(query, key, prefix_key, layout, part, scale)
        saved_weights.append(weights)
        grouped_output = torch.bmm(weights, _visible_kv(value, prefix_value, layout, part))
        outputs.append(_ungroup_queries(grouped_output, query, key, part))
    return torch.cat(outputs), saved_weights


def varlen_backward(
    query: Float[Tensor, "token head head_dim"],
    key: Float[Tensor, "token kv_head head_dim"],
    value: Float[Tensor, "token kv_head value_dim"],
    layout: VarlenLayout,
    scale: float,
    saved_weights: Sequence[Tensor | None],
    grad: Float[Tensor, "token head value_dim"],
    cached: States | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], States | None]:
    """The gradients of query, key and value, and of `cached`; weights that were not saved are recomputed."""
    grad_query, grad_key, grad_value = list[Tensor](), list[_PartGrad](), list[_PartGrad]()
    prefix = cached or layout.packed_prompts(key, value)
    for part, weights in zip(layout.parts, saved_weights, strict=True):
        prefix_key, prefix_value = prefix if prefix is not None and part is layout.rows else (None, None)
        if weights is None:
            weights = _part_weights(query, key, prefix_key, layout, part, scale)
        part_grads = attention_backward(
            weights,
            _group_queries(query, key, part).mul_(scale),
            _visible_kv(key, prefix_key, layout, part),
            _visible_kv(value, prefix_value, layout, part),
            _group_queries(grad, key, part, zero_padding=True),
        )
        grad_query.append(_ungroup_queries(part_grads[0].mul_(scale), query, key, part))
        grad_key.append(_split_grad(part_grads[1], key, layout, part))
        grad_value.append(_split_grad(part_grads[2], value, layout, part))
    (key_grad, cached_key_grad), (value_grad, cached_value_grad) = (
        _merge_grads(grads, layout) for grads in (grad_key, grad_value)
    )
    of_cached = None if cached_key_grad is None or cached_value_grad is None else (cached_key_grad, cached_value_grad)
    return (torch.cat(grad_query), key_grad, value_grad), of_cached


def _part_weights(
    query: Tensor, key: Tensor, prefix_key: Tensor | None, layout: VarlenLayout, part: PackedSequences, scale: float
) -> Tensor:
    """The attention weights of one part's queries, in the queries' dtype."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries = _group_queries(query, key, part, dtype).mul_(scale)
    keys = _visible_kv(key, prefix_key, layout, part, dtype)
    return attention_weights(queries, keys, layout.masked_out(part), (key.shape[1], part.count)).to(query.dtype)


def _group_queries(
    query: Tensor, key: Tensor, part: PackedSequences, dtype: torch.dtype | None = None, *, zero_padding: bool = False
) -> Float[Tensor, "pair rows head_dim"]:
    """A copy of a part's queries, in which the query heads of one key-value head are rows of one matrix."""
    states = part.pad(query, zero_padding=zero_padding)
    kv_heads = key.shape[1]
    states = states.view(*states.shape[:2], kv_heads, -1, states.shape[-1]).permute(2, 0, 3, 1, 4)
    grouped = torch.empty(states.shape, dtype=dtype or states.dtype, device=states.device).copy_(states)
    return grouped.view(kv_heads * part.count, -1, states.shape[-1])


def _ungroup_queries(grouped: Tensor, query: Tensor, key: Tensor, part: PackedSequences) -> Tensor:
    """The inverse of `_group_queries`, for any width."""
    states = grouped.view(key.shape[1], part.count, -1, part.longest, grouped.shape[-1]).permute(1, 3, 0, 2, 4)
    return part.unpad(states.reshape(part.count, part.longest, query.shape[1], grouped.shape[-1]))


def _visible_kv(
    states: Tensor,
    prefix: Tensor | None,
    layout: VarlenLayout,
    part: PackedSequences,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A copy of the keys (or values) that a part's queries may attend to: their prompt's first, then the part's."""
    part_states = part.pad(states).permute(2, 0, 1, 3)
    prefix_length = 0 if prefix is None else prefix.shape[1]
    heads, count, longest, width = part_states.shape
    visible = torch.empty(
        heads, count, prefix_length + longest, width, dtype=dtype or states.dtype, device=states.device
    )
    visible[:, :, prefix_length:] = part_states
    if prefix is not None:
        prefix_states = prefix.permute(2, 0, 1, 3)
        visible[:, :, :prefix_length] = prefix_states if len(prefix) == 1 else prefix_states[:, layout.index]
    return visible.view(heads * count, prefix_length + longest, width)


def _split_grad(grad: Tensor, states: Tensor, layout: VarlenLayout, part: PackedSequences) -> _PartGrad:
    """The gradient of a part's own keys (or values), and of those of the prompts that its queries attended to."""
    by_sequence = grad.view(states.shape[1], part.count, -1, states.shape[-1]).permute(1, 2, 0, 3)
    grad_part = part.unpad(by_sequence[:, by_sequence.shape[1] - part.longest :])
    prompts = layout.prompts if part is layout.rows else None
    if prompts is None:
        return grad_part, None
    grad_prefix = by_sequence[:, : prompts.longest]
    if prompts.count == 1:
        return grad_part, grad_prefix.sum(0, keepdim=True)
    zeros = grad_prefix.new_zeros(prompts.count, *grad_prefix.shape[1:])
    return grad_part, zeros.index_add_(0, layout.index, grad_prefix)


def _merge_grads(parts: Sequence[_PartGrad], layout: VarlenLayout) -> _PartGrad:
    """The gradient of all packed tokens, and that of cached prompts."""
    if layout.prompts is None or layout.prefix_is_cached:
        return parts[0]
    (prompts, _), (rows, prompts_from_rows) = parts
    assert prompts_from_rows is not None
    return torch.cat([prompts + layout.prompts.unpad(prompts_from_rows), rows]), None


def varlen_sdpa(
    query: Float[Tensor, "1 head token head_dim"],
    key: Float[Tensor, "1 kv_head token head_dim"],
    value: Float[Tensor, "1 kv_head token value_dim"],
    layout: VarlenLayout,
    scale: float,
    dropout: float,
) -> Float[Tensor, "1 token head value_dim"]:
    """Attention over packed tokens through torch's fused kernel, with cached prompts too."""
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = [
        _part_sdpa(queries, part_keys, part_values, layout, part, scale, dropout)
        for part, part_keys, part_values in layout.parts_with_kv(keys, values)
    ]
    return torch.cat(outputs)[None]


def _part_sdpa(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: VarlenLayout,
    part: PackedSequences,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "token head value_dim"]:
    """One part through torch's fused kernel, given its visible keys and values."""
    attn_output = nn.functional.scaled_dot_product_attention(
        part.pad(query).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=layout.mask(part),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[2],
    )
    return part.unpad(attn_output.transpose(1, 2))
