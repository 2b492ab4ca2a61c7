"""The query and key projections of a model's first attention, under whatever names the model has for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

_PROJECTION_NAMES = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("q_lin", "k_lin"))
"""Separate modules: Llama, OPT, BART, ViT and DINOv2; BERT; T5 and MPNet; DistilBERT."""


@final
@dataclass(frozen=True, kw_only=True)
class QueryKey:
    """The query and key projections of one attention, float32 on the CPU; a query is `x @ query[h].T`, without bias."""

    query: Float[Tensor, "head head_dim dim"]
    key: Float[Tensor, "head head_dim dim"]
    """One per query head: keys that several query heads share are repeated."""

    def product(self) -> Float[Tensor, "dim dim"]:
        """`W_q W_k^T` summed over heads: `x @ product @ y` is the sum over heads of query times key."""
        return self.query.flatten(0, 1).T @ self.key.flatten(0, 1)


def query_key(model: Any, submodule: nn.Module | None = None) -> QueryKey:
    """`W_q` and `W_k` of the model's first attention; in an encoder-decoder, of the encoder's.

    Only the weights: biases, rotary positions, and a norm before or after the projection are left out.

    Args:
        submodule: the part of the model whose first attention is meant; None for the full model.

    Raises:
        ValueError: the model has no attention of a known layout, or its weights are quantized.
    """
    if not all(param.is_floating_point() for param in model.parameters()):
        raise ValueError(
            f"the projections of this {model.config.model_type} are quantized; give a --dtype without quantization, "
            "such as bfloat16"
        )
    heads = int(model.config.get_text_config().num_attention_heads)
    for _, module in (model if submodule is None else submodule).named_modules():
        for names in _PROJECTION_NAMES:
            if all(hasattr(getattr(module, name, None), "weight") for name in names):
                query, key = (getattr(module, name).weight for name in names)
                return _split_heads(query, key, heads)
        if type(module).__name__ in _FUSED:
            return _split_heads(*_FUSED[type(module).__name__](module, heads), heads)
    raise ValueError(
        f"{model.config.model_type} has no attention with query and key projections of a known layout; choose a "
        "backbone like Llama, Qwen, GPT-2, GPT-NeoX, BLOOM, OPT, T5, BART, BERT, ViT or DINOv2"
    )


def _split_heads(query: Tensor, key: Tensor, heads: int) -> QueryKey:
    dim, head_dim = query.shape[1], query.shape[0] // heads
    queries, keys = (weight.detach().float().cpu().reshape(-1, head_dim, dim) for weight in (query, key))
    return QueryKey(query=queries, key=keys.repeat_interleave(heads // len(keys), 0))


def _stacked(name: str) -> Callable[[Any, int], tuple[Tensor, Tensor]]:
    """One matrix: all queries, then all keys, then all values."""

    def parts(module: Any, heads: int) -> tuple[Tensor, Tensor]:
        weight = getattr(module, name).weight
        if type(getattr(module, name)).__name__ == "Conv1D":  # GPT-2's weight is transposed
            weight = weight.T
        queries = heads * module.head_dim
        keys = (len(weight) - queries) // 2
        return weight[:queries], weight[queries : queries + keys]

    return parts


def _interleaved(module: Any, heads: int) -> tuple[Tensor, Tensor]:
    """One matrix: query, key and value of the first head, then of the next."""
    weight = module.query_key_value.weight
    queries, keys, _ = weight.reshape(heads, 3, -1, weight.shape[1]).unbind(1)
    return queries.flatten(0, 1), keys.flatten(0, 1)


_FUSED: dict[str, Callable[[Any, int], tuple[Tensor, Tensor]]] = {
    "GPT2Attention": _stacked("c_attn"),
    "Phi3Attention": _stacked("qkv_proj"),
    "GPTNeoXAttention": _interleaved,
    "BloomAttention": _interleaved,
}
"""Attention classes with one fused projection, by the layout of its matrix."""


def lazy_product(model: Any, submodule: nn.Module | None = None) -> Callable[[], Float[Tensor, "dim dim"]]:
    """A function that computes `query_key(model, submodule).product()`, and raises as `query_key` does, when called."""
    return lambda: query_key(model, submodule).product()
