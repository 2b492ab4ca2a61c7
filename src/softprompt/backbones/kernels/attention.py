"""Attention for frozen models: over packed tokens, and on a CPU by grouped matrix products.

Packed: prompts and rows lie one behind another in one sequence without padding, so that everything but attention runs
over real tokens alone and once; attention itself keeps them apart and lets each row see its prompt.

On a CPU the backward pass of torch's fused kernel runs at about a tenth of the rate of a matrix product, and
transformers repeats keys and values for every group of query heads before it. Here the query heads of one key-value
head are rows of one product, nothing is repeated, and the weights are kept for the backward pass up to `MOST_KEPT`
keys, and computed again above it. Its forward pass alone is the faster one, the more so the longer the rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from softprompt.backbones.kernels.varlen import Block, VarlenLayout

NAME = "softprompt"
"""Under which transformers knows it."""
MOST_KEPT = 512
"""Keys a query up to which its weights are kept for the backward pass: up to there they are the smaller part of it."""
Pairs = tuple[int, int]
"""Rows and key-value heads, in either order: the leading axes of what one product is over."""


def _weights(
    query: Float[Tensor, "pair rows head_dim"],
    key: Float[Tensor, "pair keys head_dim"],
    blocked: Bool[Tensor, "#first #second 1 #seq some"],
    pairs: Pairs,
    bias: Float[Tensor, "#first second 1 seq keys"] | None = None,
) -> Float[Tensor, "pair rows keys"]:
    """The attention weights, float32 at least; `blocked` is about the last keys, the ones before are all seen."""
    # In float32 like torch's own kernel: a large score rounded to bfloat16 is off by more than a weight can bear.
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.bmm(query.to(wide), key.to(wide).transpose(1, 2))
    seq, some = blocked.shape[-2:]
    by_query = scores.view(*pairs, -1, seq, scores.shape[-1])
    if bias is not None:
        by_query += bias
    by_query[..., scores.shape[-1] - some :].masked_fill_(blocked, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)


def _gradients(
    weights: Float[Tensor, "pair rows keys"],
    query: Float[Tensor, "pair rows head_dim"],
    key: Float[Tensor, "pair keys head_dim"],
    value: Float[Tensor, "pair keys value_dim"],
    grad: Float[Tensor, "pair rows value_dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of `softmax(Q K^T) V` by query, key and value, from its weights."""
    inner = torch.bmm(grad, value.transpose(1, 2))
    scores = torch.ops.aten._softmax_backward_data(inner, weights, -1, weights.dtype)
    return torch.bmm(scores, key), torch.bmm(scores.transpose(1, 2), query), torch.bmm(weights.transpose(1, 2), grad)


class _Grouped(torch.autograd.Function):
    """`softmax(Q K^T, masked) V`, a pair being a row of the batch and a key-value head."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor, bias: Tensor | None, pairs: Pairs
    ) -> Tensor:
        weights = _weights(query, key, blocked, pairs, bias).to(value.dtype)
        kept = weights if weights.shape[-1] <= MOST_KEPT else None
        ctx.save_for_backward(query, key, value, blocked, bias, kept)
        ctx.pairs = pairs
        return torch.bmm(weights, value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, blocked, bias, weights = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if weights is None:
                weights = _weights(query, key, blocked, ctx.pairs, bias).to(value.dtype)
            return (*_gradients(weights, query, key, value, grad), None, None, None)


def grouped_attention(
    query: Float[Tensor, "batch head seq head_dim"],
    key: Float[Tensor, "batch kv_head keys head_dim"],
    value: Float[Tensor, "batch kv_head keys value_dim"],
    mask: Bool[Tensor, "#batch one #seq keys"],
    scale: float,
    bias: Float[Tensor, "#batch head seq keys"] | None = None,
) -> Float[Tensor, "batch head seq value_dim"]:
    """Masked attention whose query heads share key-value heads; gradients as torch's own, none to `bias`.

    Values may be narrower than keys, as in multi-head latent attention.

    Args:
        bias: added to the scores; only where no key-value head is shared.
    """
    query, key, value = _one_dtype(query, key, value)
    batch, heads, seq, width = query.shape
    pairs = batch, key.shape[1]
    wide = None if bias is None else bias[:, :, None]
    blocked = ~mask.expand(-1, -1, seq, -1)[:, None]
    with torch.autocast(query.device.type, enabled=False):
        rows = (query * scale).reshape(batch * pairs[1], heads // pairs[1] * seq, width)
        found = _Grouped.apply(  # type: ignore[no-untyped-call]
            rows, key.reshape(len(rows), -1, width), value.reshape(len(rows), -1, value.shape[-1]), blocked, wide, pairs
        )
    result: Tensor = found.view(batch, heads, seq, value.shape[-1])
    return result


def varlen_forward(
    query: Float[Tensor, "token head head_dim"],
    key: Float[Tensor, "token kv_head head_dim"],
    value: Float[Tensor, "token kv_head value_dim"],
    layout: VarlenLayout,
    scale: float,
    *,
    differentiated: bool,
) -> tuple[Float[Tensor, "token head value_dim"], list[Tensor | None]]:
    """Attention within each prompt, and within each row behind its prompt; and each block's weights, where kept.

    Args:
        differentiated: there will be a backward pass, which wants the weights. Where there is none, and where they are
            too many to keep, torch's fused kernel is faster, whose forward pass needs none of them.
    """
    found, kept, prompts = list[Tensor](), list[Tensor | None](), layout.prefix_kv(key, value)
    for block in layout.blocks:
        keys, values = prompts if prompts is not None and block is layout.rows else (None, None)
        if not differentiated or block.longest + (0 if keys is None else keys.shape[1]) > MOST_KEPT:
            found.append(_fused(query, *layout.view(block, key, value, prompts), layout, block, scale))
            kept.append(None)
            continue
        weights = _block_weights(query, key, keys, layout, block, scale)
        kept.append(weights)
        answer = torch.bmm(weights, _visible_kv(value, values, layout, block))
        found.append(_ungrouped(answer, query, key, block))
    return torch.cat(found), kept


def varlen_backward(
    query: Float[Tensor, "token head head_dim"],
    key: Float[Tensor, "token kv_head head_dim"],
    value: Float[Tensor, "token kv_head value_dim"],
    layout: VarlenLayout,
    scale: float,
    kept: Sequence[Tensor | None],
    grad: Float[Tensor, "token head value_dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; a row's view of its prompt, and weights not kept, are put together again."""
    queries, keys, values, before = [], [], [], layout.prefix_kv(key, value)
    for block, weights in zip(layout.blocks, kept, strict=True):
        prompts = before if before is not None and block is layout.rows else (None, None)
        if weights is None:
            weights = _block_weights(query, key, prompts[0], layout, block, scale)
        by_query, by_key, by_value = _gradients(
            weights,
            _grouped(query, key, block).mul_(scale),
            _visible_kv(key, prompts[0], layout, block),
            _visible_kv(value, prompts[1], layout, block),
            _grouped(grad, key, block, blank=True),
        )
        queries.append(_ungrouped(by_query.mul_(scale), query, key, block))
        keys.append(_scatter_grad(by_key, key, layout, block))
        values.append(_scatter_grad(by_value, value, layout, block))
    return torch.cat(queries), _gathered(keys), _gathered(values)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
        found, kept = varlen_forward(query, key, value, layout, scale, differentiated=any(ctx.needs_input_grad))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.layout, ctx.scale = layout, scale
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return (*varlen_backward(query, key, value, ctx.layout, ctx.scale, kept, grad), None, None)


def _block_weights(
    query: Tensor, key: Tensor, before: Tensor | None, layout: VarlenLayout, block: Block, scale: float
) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = _grouped(query, key, block, wide).mul_(scale)
    keys = _visible_kv(key, before, layout, block, wide)
    return _weights(rows, keys, layout.blocked(block), (key.shape[1], block.count)).to(query.dtype)


def _grouped(
    query: Tensor, key: Tensor, block: Block, dtype: torch.dtype | None = None, *, blank: bool = False
) -> Float[Tensor, "pair rows head_dim"]:
    """A copy of a block's queries, a product's rows being the query heads of one key-value head."""
    part = block.padded(query, blank=blank)
    heads = key.shape[1]
    part = part.view(*part.shape[:2], heads, -1, part.shape[-1]).permute(2, 0, 3, 1, 4)
    rows = torch.empty(part.shape, dtype=dtype or part.dtype, device=part.device).copy_(part)
    return rows.view(heads * block.count, -1, part.shape[-1])


def _ungrouped(rows: Tensor, query: Tensor, key: Tensor, block: Block) -> Tensor:
    """The inverse of `_grouped`, of any width."""
    part = rows.view(key.shape[1], block.count, -1, block.longest, rows.shape[-1]).permute(1, 3, 0, 2, 4)
    return block.flat(part.reshape(block.count, block.longest, query.shape[1], rows.shape[-1]))


def _visible_kv(
    states: Tensor, before: Tensor | None, layout: VarlenLayout, block: Block, dtype: torch.dtype | None = None
) -> Tensor:
    """A copy of the keys or values that a block's queries can see: their prompt's out of `before`, then their own."""
    own = block.padded(states).permute(2, 0, 1, 3)
    length = 0 if before is None else before.shape[1]
    heads, count, longest, width = own.shape
    seen = torch.empty(heads, count, length + longest, width, dtype=dtype or states.dtype, device=states.device)
    seen[:, :, length:] = own
    if before is not None:
        vectors = before.permute(2, 0, 1, 3)
        seen[:, :, :length] = vectors if len(before) == 1 else vectors[:, layout.index]
    return seen.view(heads * count, length + longest, width)


def _scatter_grad(grad: Tensor, states: Tensor, layout: VarlenLayout, block: Block) -> list[Tensor]:
    """The gradient of the block's own keys or values and, before it, of the prompts' that its queries saw."""
    wide = grad.view(states.shape[1], block.count, -1, states.shape[-1]).permute(1, 2, 0, 3)
    own = block.flat(wide[:, wide.shape[1] - block.longest :])
    prompts = layout.prompts if block is layout.rows else None
    if prompts is None:
        return [own]
    seen = wide[:, : prompts.longest]
    if prompts.count == 1:
        return [prompts.flat(seen.sum(0, keepdim=True)), own]
    empty = seen.new_zeros(prompts.count, *seen.shape[1:])
    return [prompts.flat(empty.index_add_(0, layout.index, seen)), own]


def _gathered(parts: list[list[Tensor]]) -> Tensor:
    """Gradients of all tokens from those that each block gave."""
    if len(parts) == 1:
        return parts[0][0]
    (own,), (seen, rows) = parts
    return torch.cat([own + seen, rows])


def varlen_attention(
    query: Float[Tensor, "one head token head_dim"],
    key: Float[Tensor, "one kv_head token head_dim"],
    value: Float[Tensor, "one kv_head token value_dim"],
    layout: VarlenLayout,
    scale: float,
) -> Float[Tensor, "one token head value_dim"]:
    """Attention within each prompt, and within each row behind its prompt, as the layout says."""
    by_token = (states[0].transpose(0, 1) for states in _one_dtype(query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        found: Tensor = _Packed.apply(*by_token, layout, scale)  # type: ignore[no-untyped-call]
    return found[None]


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as torch's own kernel takes them in an autocast region: in its dtype; elsewhere as they are."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def varlen_sdpa(
    query: Float[Tensor, "one head token head_dim"],
    key: Float[Tensor, "one kv_head token head_dim"],
    value: Float[Tensor, "one kv_head token value_dim"],
    layout: VarlenLayout,
    scale: float,
    dropout: float,
) -> Float[Tensor, "one token head value_dim"]:
    """The same through torch's fused kernel; also of prompts that are kept."""
    by_token = [states[0].transpose(0, 1) for states in (query, key, value)]
    found = [
        _fused(by_token[0], keys, values, layout, block, scale, dropout)
        for block, keys, values in layout.views(*by_token[1:])
    ]
    return torch.cat(found)[None]


def _fused(
    query: Tensor, keys: Tensor, values: Tensor, layout: VarlenLayout, block: Block, scale: float, dropout: float = 0.0
) -> Float[Tensor, "token head value_dim"]:
    """One block's, from its view of the keys and values."""
    found = nn.functional.scaled_dot_product_attention(
        block.padded(query).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=layout.visible(block),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[2],
    )
    return block.flat(found.transpose(1, 2))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: VarlenLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Ours for packed tokens, and for several tokens on a CPU under a plain mask; torch's fused kernel elsewhere."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    on_cpu = query.device.type == "cpu" and dropout == 0.0
    if layout is not None:
        if layout.record_kv:
            layout.record(key[0].transpose(0, 1), value[0].transpose(0, 1))
        if on_cpu and not layout.prefix_is_cached:
            found = varlen_attention(query, key, value, layout, scale)
        else:
            found = varlen_sdpa(query, key, value, layout, scale, dropout)
        return found, None
    bias: Tensor | None = others.get("position_bias")
    if len(query) != len(key):
        return _folded(module, query, key, value, attention_mask, bias, dropout, scale, **others), None
    mask = attention_mask
    if mask is None and bias is not None and not getattr(module, "is_causal", False):
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    fits = mask is not None and mask.dtype is torch.bool and mask.shape[0] in (1, len(query)) and mask.shape[1] == 1
    frozen = bias is None or (not bias.requires_grad and query.shape[1] == key.shape[1])
    if mask is None or not (on_cpu and query.shape[2] > 1 and fits and frozen):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    found = grouped_attention(query, key, value, mask, scale, bias)
    return found.transpose(1, 2).contiguous(), None


def _folded(
    module: nn.Module,
    query: Float[Tensor, "many head seq head_dim"],
    key: Float[Tensor, "batch head keys head_dim"],
    value: Float[Tensor, "batch head keys head_dim"],
    mask: Bool[Tensor, "batch 1 1 keys"] | None,
    bias: Float[Tensor, "1 head seq keys"] | None,
    dropout: float,
    scale: float,
    **others: Any,
) -> Float[Tensor, "many seq head head_dim"]:
    """Several rows of queries over each row of keys (candidates over one text): they are further queries of that row.

    So keys and values are not copied for each of them.
    """
    batch, (_, heads, seq, width) = len(key), query.shape
    count = len(query) // batch
    wide = query.view(batch, count, heads, seq, width).transpose(1, 2).reshape(batch, heads, count * seq, width)
    if bias is not None:
        others["position_bias"] = bias.repeat(1, 1, count, 1)
    found = _attention(module, wide, key, value, mask, dropout, scale, **others)[0]
    return found.reshape(batch * count, seq, heads, width)


def install(model: Any) -> None:
    """Let `model` use it, if it would use torch's fused kernel."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def supports_varlen(model: Any) -> bool:
    """Whether `model` hands the layout on to its attention, and that is ours."""
    return bool(getattr(model, "_supports_attention_backend", False)) and is_ours(model)


def is_ours(model: Any) -> bool:
    """Whether `model` computes its attention here."""
    return bool(model.config._attn_implementation == NAME)


def everything(device: torch.device) -> Bool[Tensor, "1 1 1 1"]:
    """A mask for packed tokens: a whole one, so that the model makes none of its own; attention does not look at it."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
