"""Attention as grouped matrix products, for a CPU.

On a CPU, the backward pass of torch's fused kernel (SDPA) runs at about a tenth of the rate of a matrix product, and
transformers first repeats keys and values for every group of query heads. Here, the query heads that share a key-value
head are rows of one product, nothing is repeated, and the attention weights are saved for the backward pass up to
`MAX_SAVED_KEYS` keys and recomputed beyond. The fused kernel's forward pass alone is faster, the more so the longer the
rows.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_SAVED_KEYS = 512
"""Keys per query up to which attention weights are saved for the backward pass; up to here they take little memory."""
Pairs = tuple[int, int]
"""Batch rows and key-value heads, in either order: the two axes that one batched matrix product flattens into one."""


def saves_weights(keys: int) -> bool:
    """Whether the weights over this many keys are saved for the backward pass, not recomputed in it."""
    return keys <= MAX_SAVED_KEYS


def attention_weights(
    query: Float[Tensor, "pair rows head_dim"],
    key: Float[Tensor, "pair keys head_dim"],
    masked_out: Bool[Tensor, "#first #second 1 #seq last_keys"],
    pairs: Pairs,
    bias: Float[Tensor, "#first second 1 seq keys"] | None = None,
) -> Float[Tensor, "pair rows keys"]:
    """`softmax(Q K^T)`, in float32 at least.

    Args:
        masked_out: True where a query must not attend to a key; covers the last keys, and all before them are visible.
    """
    # In float32 like torch's own kernel: rounding a large score to bfloat16 changes its weight too much.
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = torch.bmm(query.to(dtype), key.to(dtype).transpose(1, 2))
    seq, last_keys = masked_out.shape[-2:]
    by_query = scores.view(*pairs, -1, seq, scores.shape[-1])
    if bias is not None:
        by_query += bias
    by_query[..., scores.shape[-1] - last_keys :].masked_fill_(masked_out, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)


def attention_backward(
    weights: Float[Tensor, "pair rows keys"],
    query: Float[Tensor, "pair rows head_dim"],
    key: Float[Tensor, "pair keys head_dim"],
    value: Float[Tensor, "pair keys value_dim"],
    grad: Float[Tensor, "pair rows value_dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `softmax(Q K^T) V` with respect to query, key and value, given its weights."""
    grad_weights = torch.bmm(grad, value.transpose(1, 2))
    grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_query, grad_key = torch.bmm(grad_scores, key), torch.bmm(grad_scores.transpose(1, 2), query)
    return grad_query, grad_key, torch.bmm(weights.transpose(1, 2), grad)


class _GroupedAttention(torch.autograd.Function):
    """`softmax(Q K^T, masked) V`; a pair is a batch row and a key-value head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, masked_out: Tensor, bias: Tensor | None, pairs: Pairs
    ) -> Tensor:
        weights = attention_weights(query, key, masked_out, pairs, bias).to(value.dtype)
        saved_weights = weights if saves_weights(weights.shape[-1]) else None
        ctx.save_for_backward(query, key, value, masked_out, bias, saved_weights)
        ctx.pairs = pairs
        return torch.bmm(weights, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, masked_out, bias, weights = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if weights is None:
                weights = attention_weights(query, key, masked_out, ctx.pairs, bias).to(value.dtype)
            return (*attention_backward(weights, query, key, value, grad), None, None, None)


def grouped_attention(
    query: Float[Tensor, "batch head seq head_dim"],
    key: Float[Tensor, "batch kv_head keys head_dim"],
    value: Float[Tensor, "batch kv_head keys value_dim"],
    mask: Bool[Tensor, "#batch 1 #seq keys"],
    scale: float,
    bias: Float[Tensor, "#batch head seq keys"] | None = None,
) -> Float[Tensor, "batch head seq value_dim"]:
    """Masked attention whose query heads share key-value heads; differentiable, except with respect to `bias`.

    Values may be narrower than keys, as in multi-head latent attention.

    Args:
        mask: True where a query attends to a key.
        bias: added to the scores; requires one key-value head per query head.
    """
    query, key, value = to_autocast_dtype(query, key, value)
    batch, heads, seq, width = query.shape
    pairs = batch, key.shape[1]
    if bias is not None:
        bias = bias[:, :, None]
    masked_out = ~mask.expand(-1, -1, seq, -1)[:, None]
    with torch.autocast(query.device.type, enabled=False):
        queries = (query * scale).reshape(batch * pairs[1], heads // pairs[1] * seq, width)
        keys, values = key.reshape(len(queries), -1, width), value.reshape(len(queries), -1, value.shape[-1])
        attn_output: Tensor = _GroupedAttention.apply(  # type: ignore[no-untyped-call]
            queries, keys, values, masked_out, bias, pairs
        )
    return attn_output.view(batch, heads, seq, value.shape[-1])


def to_autocast_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to the autocast dtype inside an autocast region, as torch does for its own kernel."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)
