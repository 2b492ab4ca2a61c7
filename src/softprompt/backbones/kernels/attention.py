"""Attention as transformers' models call it: `choose_kernel` says which path runs when."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softprompt.backbones.kernels.grouped import grouped_attention
from softprompt.backbones.kernels.varlen import VarlenLayout
from softprompt.backbones.kernels.varlen_attention import varlen_attention, varlen_sdpa

ATTN_IMPLEMENTATION = "softprompt"
"""The name of `attention_forward` in transformers' registry, a value of `attn_implementation`."""
Kernel = Literal["varlen_grouped", "varlen_sdpa", "fold_candidates", "grouped", "sdpa"]


def choose_kernel(
    query: Float[Tensor, "queries head seq head_dim"],
    key: Float[Tensor, "batch kv_head keys head_dim"],
    mask: Tensor | None,
    *,
    layout: VarlenLayout | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
) -> Kernel:
    """The attention path for one call of transformers' attention interface: the first row that applies.

    | path              | what runs                         | when                                                |
    |-------------------|-----------------------------------|-----------------------------------------------------|
    | `varlen_grouped`  | grouped products, part by part    | varlen layout; CPU, no dropout, no cached prefix    |
    | `varlen_sdpa`     | torch's SDPA, part by part        | varlen layout                                       |
    | `fold_candidates` | `grouped` or `sdpa`               | several batch rows of queries per batch row of keys |
    | `grouped`         | grouped products (`grouped.py`)   | CPU, no dropout, several query tokens; a boolean    |
    |                   |                                   | mask shared by all heads, or no mask but a bias     |
    |                   |                                   | that is not causal; a bias only if it needs no      |
    |                   |                                   | gradient and no key-value head is shared            |
    | `sdpa`            | transformers' SDPA implementation | anything else: GPU, dropout, one query token, no    |
    |                   |                                   | mask, additive mask, mask per head, trained bias    |

    What does not change the path:

    - Gradient. Both grouped paths save the attention weights for the backward pass up to `grouped.MAX_SAVED_KEYS` keys
      and recompute them beyond. Where a part of `varlen_grouped` saves no weights (no gradient is needed, or there are
      too many keys), its forward pass runs through SDPA.
    - Dtype. Grouped products compute scores and softmax in float32 at least, as SDPA does. In an autocast region their
      inputs are first cast to its dtype.
    - Sliding window. It is part of the mask that transformers makes. A varlen layout has no window: callers reject rows
      longer than it.
    - Head sizes. Query heads may share key-value heads, and values may be narrower than keys, on every path (except
      that `grouped` with a bias shares no heads).

    Two callers run grouped products without asking: fused Llama layers (`llama.py`; CPU, no dropout), with a cached
    prefix too, and T5 encoders over packed tokens (`t5.py`), on every device.
    """
    may_group = query.device.type == "cpu" and dropout == 0.0
    if layout is not None:
        return "varlen_grouped" if may_group and not layout.prefix_is_cached else "varlen_sdpa"
    if len(query) != len(key):
        return "fold_candidates"
    if mask is None:
        has_mask = bias is not None and not is_causal
    else:
        has_mask = mask.dtype is torch.bool and mask.shape[0] in (1, len(query)) and mask.shape[1] == 1
    has_fixed_bias = bias is None or (not bias.requires_grad and query.shape[1] == key.shape[1])
    return "grouped" if may_group and query.shape[2] > 1 and has_mask and has_fixed_bias else "sdpa"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: VarlenLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, through the path that `choose_kernel` names."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias: Tensor | None = kwargs.get("position_bias")
    is_causal = bool(getattr(module, "is_causal", False))
    kernel = choose_kernel(query, key, attention_mask, layout=layout, bias=bias, dropout=dropout, is_causal=is_causal)
    if layout is not None:
        if layout.record_kv:
            layout.record(key[0].transpose(0, 1), value[0].transpose(0, 1))
        if kernel == "varlen_grouped":
            return varlen_attention(query, key, value, layout, scale), None
        return varlen_sdpa(query, key, value, layout, scale, dropout), None
    if kernel == "fold_candidates":
        return _fold_candidates(module, query, key, value, attention_mask, bias, dropout, scale, **kwargs), None
    if kernel == "sdpa":
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    mask = attention_mask
    if mask is None:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    attn_output = grouped_attention(query, key, value, mask, scale, bias)
    return attn_output.transpose(1, 2).contiguous(), None


def _fold_candidates(
    module: nn.Module,
    query: Float[Tensor, "queries head seq head_dim"],
    key: Float[Tensor, "batch head keys head_dim"],
    value: Float[Tensor, "batch head keys head_dim"],
    mask: Bool[Tensor, "batch 1 1 keys"] | None,
    bias: Float[Tensor, "1 head seq keys"] | None,
    dropout: float,
    scale: float,
    **kwargs: Any,
) -> Float[Tensor, "queries seq head head_dim"]:
    """Several batch rows of queries per batch row of keys (candidates over one text) become more queries of that row.

    So keys and values are not copied for each candidate.
    """
    batch, (_, heads, seq, width) = len(key), query.shape
    count = len(query) // batch
    folded = query.view(batch, count, heads, seq, width).transpose(1, 2).reshape(batch, heads, count * seq, width)
    if bias is not None:
        kwargs["position_bias"] = bias.repeat(1, 1, count, 1)
    attn_output = attention_forward(module, folded, key, value, mask, dropout, scale, **kwargs)[0]
    return attn_output.reshape(batch * count, seq, heads, width)


def install(model: Any) -> None:
    """Make `model` call `attention_forward`, if it would call torch's fused kernel."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTN_IMPLEMENTATION)


def is_installed(model: Any) -> bool:
    """Whether `model` calls `attention_forward`."""
    return bool(model.config._attn_implementation == ATTN_IMPLEMENTATION)


def supports_varlen(model: Any) -> bool:
    """Whether `model` calls `attention_forward` and passes the varlen layout on to it."""
    return bool(getattr(model, "_supports_attention_backend", False)) and is_installed(model)


def varlen_mask(device: torch.device) -> Bool[Tensor, "1 1 1 1"]:
    """The `attention_mask` for packed tokens: a placeholder that keeps the model from making one; it is not read."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(ATTN_IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, sdpa_mask)
