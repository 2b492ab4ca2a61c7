"""The query and key projections of a model's first attention, whatever the model calls them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

_PAIRS = (("q_proj", "k_proj"), ("query", "key"), ("q", "k"), ("q_lin", "k_lin"))
"""Two modules side by side: Llama, OPT, BART, ViT and DINOv2; BERT; T5 and MPNet; DistilBERT."""


@final
@dataclass(frozen=True, kw_only=True)
class QueryKey:
    """Two projections of one attention, float32 on the CPU: a query is `x @ query[h].T`, without bias."""

    query: Float[Tensor, "head head_dim dim"]
    key: Float[Tensor, "head head_dim dim"]
    """One a head of the queries: keys that several heads share are repeated."""

    def product(self) -> Float[Tensor, "dim dim"]:
        """`W_q W_k^T`, all heads together: `x @ product @ y` is the sum over heads of query times key."""
        return self.query.flatten(0, 1).T @ self.key.flatten(0, 1)


def query_key(model: Any, part: Any = None) -> QueryKey:
    """`W_q` and `W_k` of the first attention that an input meets, or `part` of it; the encoder's in an encoder-decoder.

    The weights alone: biases, rotary positions and a norm before or after the projection stay out.

    Raises:
        ValueError: the model has no attention whose layout is known, or holds its weights in 4 or 8 bits.
    """
    if not all(weights.is_floating_point() for weights in model.parameters()):
        raise ValueError(
            f"the projections of this {model.config.model_type} are quantised; give a --dtype of whole weights, such "
            "as bfloat16"
        )
    heads = int(model.config.get_text_config().num_attention_heads)
    for _, module in (model if part is None else part).named_modules():
        for names in _PAIRS:
            if all(hasattr(getattr(module, name, None), "weight") for name in names):
                query, key = (getattr(module, name).weight for name in names)
                return _split(query, key, heads)
        if type(module).__name__ in _FUSED:
            return _split(*_FUSED[type(module).__name__](module, heads), heads)
    raise ValueError(
        f"{model.config.model_type} has no attention with query and key projections of a known layout; choose a "
        "backbone like Llama, Qwen, GPT-2, GPT-NeoX, BLOOM, OPT, T5, BART, BERT, ViT or DINOv2"
    )


def _split(query: Tensor, key: Tensor, heads: int) -> QueryKey:
    dim, head_dim = query.shape[1], query.shape[0] // heads
    queries, keys = (weight.detach().float().cpu().reshape(-1, head_dim, dim) for weight in (query, key))
    return QueryKey(query=queries, key=keys.repeat_interleave(heads // len(keys), 0))


def _stacked(name: str) -> Callable[[Any, int], tuple[Tensor, Tensor]]:
    """One matrix of all queries, all keys and all values."""

    def parts(module: Any, heads: int) -> tuple[Tensor, Tensor]:
        weight = getattr(module, name).weight
        # GPT-2's Conv1D keeps its weight the other way round.
        whole = weight.T if type(getattr(module, name)).__name__ == "Conv1D" else weight
        queries = heads * module.head_dim
        keys = (len(whole) - queries) // 2
        return whole[:queries], whole[queries : queries + keys]

    return parts


def _interleaved(module: Any, heads: int) -> tuple[Tensor, Tensor]:
    """One matrix with each head's query, key and value behind one another."""
    weight = module.query_key_value.weight
    queries, keys, _ = weight.reshape(heads, 3, -1, weight.shape[1]).unbind(1)
    return queries.flatten(0, 1), keys.flatten(0, 1)


_FUSED: dict[str, Callable[[Any, int], tuple[Tensor, Tensor]]] = {
    "GPT2Attention": _stacked("c_attn"),
    "Phi3Attention": _stacked("qkv_proj"),
    "GPTNeoXAttention": _interleaved,
    "BloomAttention": _interleaved,
}
"""Attentions that project everything at once; the layout differs between models, so each is named."""


def product_of(model: Any, part: Any = None) -> Callable[[], Float[Tensor, "dim dim"]]:
    """`query_key(model, part).product`, not computed before it is asked for; raises as `query_key` does, then."""
    return lambda: query_key(model, part).product()
