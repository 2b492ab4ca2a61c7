"""Attention for training on a CPU: grouped matrix products in place of the slow backward of torch's fused kernel.

On a CPU the fused kernel's backward runs at about a tenth of the rate of a matrix product, and transformers repeats
keys and values for every group of query heads before it. Here the query heads of one key-value head are rows of one
product, nothing is repeated, and the weights are computed again in the backward pass instead of being kept.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "softprompt_cpu"
"""Under which transformers knows it."""


class _Grouped(torch.autograd.Function):
    """`softmax(Q K^T, masked) V`, a pair being a row of the batch and a key-value head."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "pair rows head_dim"],
        key: Float[Tensor, "pair keys head_dim"],
        value: Float[Tensor, "pair keys head_dim"],
        hidden: Bool[Tensor, "batch 1 1 seq keys"],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, hidden)
        return torch.bmm(_weights(query, key, hidden).to(value.dtype), value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, hidden = ctx.saved_tensors
        weights = _weights(query, key, hidden)
        value_grad = torch.bmm(weights.to(grad.dtype).transpose(1, 2), grad)
        inner = torch.bmm(grad, value.transpose(1, 2))
        scores = torch.ops.aten._softmax_backward_data(inner.float(), weights, -1, torch.float32).to(query.dtype)
        return torch.bmm(scores, key), torch.bmm(scores.transpose(1, 2), query), value_grad, None


def _weights(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    # In float32 like torch's own kernel: a large score rounded to bfloat16 is off by more than a weight can bear.
    scores = torch.bmm(query.float(), key.float().transpose(1, 2))
    batch, _, _, seq, keys = hidden.shape
    scores.view(batch, -1, scores.shape[1] // seq, seq, keys).masked_fill_(hidden, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)


def grouped_attention(
    query: Float[Tensor, "batch head seq head_dim"],
    key: Float[Tensor, "batch kv_head keys head_dim"],
    value: Float[Tensor, "batch kv_head keys head_dim"],
    mask: Bool[Tensor, "batch one seq keys"],
    scale: float,
) -> Float[Tensor, "batch head seq head_dim"]:
    """Masked attention whose query heads share key-value heads; gradients as torch's own."""
    batch, heads, seq, width = query.shape
    pairs, group = batch * key.shape[1], heads // key.shape[1]
    rows = (query * scale).reshape(pairs, group * seq, width)
    found = _Grouped.apply(  # type: ignore[no-untyped-call]
        rows, key.reshape(pairs, -1, width), value.reshape(pairs, -1, width), ~mask[:, None]
    )
    result: Tensor = found.view(batch, heads, seq, width)
    return result


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Ours for several tokens on a CPU under a plain mask; torch's fused kernel everywhere else."""
    ours = (
        query.device.type == "cpu"
        and query.shape[2] > 1
        and attention_mask is not None
        and attention_mask.dtype is torch.bool
        and attention_mask.shape[:2] == (query.shape[0], 1)
        and dropout == 0.0
        and others.get("position_bias") is None
    )
    if not ours or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = grouped_attention(query, key, value, attention_mask, scale)
    return found.transpose(1, 2).contiguous(), None


def install(model: Any) -> None:
    """Let `model` use it, if it runs on a CPU and would use torch's fused kernel."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
