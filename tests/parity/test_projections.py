"""The first attention's query and key projections reproduce the attention weights of the model itself."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from softprompt import Backbone
from softprompt.backbones.projections import query_key

MakeBackbone = Callable[[str], Backbone]
WITHOUT_NORM = ["llama", "gpt2", "gpt_neox", "opt", "gemma", "bloom", "mistral", "t5", "bart", "bert", "mpnet"]
"""Models whose scores are query times key; Qwen3 norms queries and keys, and Gemma2 caps the product."""
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}


@torch.no_grad()
def first_attention(model: Any, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of the first attention, and its attention weights."""
    hidden_states: list[torch.Tensor] = []
    first = next(m for m in model.modules() if re.search("(?<!Layer)(?<!LayerSelf)Attention$", type(m).__name__))

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_states.append(args[0] if args else kwargs["hidden_states"])
        # Zero BLOOM's position bias.
        return args, kwargs | {name: torch.zeros_like(value) for name, value in kwargs.items() if name == "alibi"}

    hook = first.register_forward_pre_hook(record, with_kwargs=True)
    try:
        output = model(**inputs, output_attentions=True)
    finally:
        hook.remove()
    attentions = output.get("encoder_attentions", output.get("attentions"))
    return hidden_states[0], attentions[0]


def eager_copy(backbone: Backbone) -> Any:
    """A copy with eager attention and no position bias."""
    config = copy.deepcopy(backbone.model.config)  # from_config writes to it
    kind = {"causal": transformers.AutoModelForCausalLM, "encoder_decoder": transformers.AutoModelForSeq2SeqLM}
    model = kind.get(backbone.architecture, transformers.AutoModel).from_config(config, attn_implementation="eager")
    model.load_state_dict(backbone.model.state_dict())
    for name, weights in model.named_parameters():
        if "relative_attention_bias" in name:
            weights.data.zero_()
    return model.float().eval()


def attention_weights(model: Any, hidden_states: torch.Tensor, causal: bool) -> torch.Tensor:
    projections = query_key(model)
    head_dim = projections.query.shape[1]
    scale = 1.0 if model.config.model_type in ("t5", "mt5") else head_dim**-0.5
    heads = []
    for query, key in zip(projections.query, projections.key, strict=True):
        scores = scale * (hidden_states @ query.T) @ (hidden_states @ key.T).transpose(1, 2)
        if causal:
            scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
        heads.append(scores.softmax(-1))
    return torch.stack(heads, 1)


@pytest.mark.parametrize("name", WITHOUT_NORM)
def test_query_key_gives_the_models_attention(name: str, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name)
    model = eager_copy(backbone)
    ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    extra: dict[str, Any] = {"decoder_input_ids": ids} if backbone.architecture == "encoder_decoder" else {}
    if model.config.model_type in ("llama", "gpt_neox", "gemma", "mistral"):
        extra["position_ids"] = torch.zeros_like(ids)  # no rotation
    hidden_states, expected = first_attention(model, input_ids=ids, **extra)
    # float32 products of 32 terms, and a softmax of scores of order 10: 1e-4 leaves an order of magnitude.
    torch.testing.assert_close(
        attention_weights(model, hidden_states, backbone.architecture == "causal"), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("config", [transformers.ViTConfig, transformers.Dinov2Config])
def test_query_key_of_a_vision_model(config: Any) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config(**SIZES), attn_implementation="eager").eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 5 if weights.ndim == 2 else 1
    hidden_states, expected = first_attention(model, pixel_values=torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(attention_weights(model, hidden_states, False), expected, rtol=1e-4, atol=1e-5)


def test_product_sums_over_heads(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("llama")
    projections = query_key(backbone.model)
    assert projections.query.shape == projections.key.shape == (4, 8, 32)  # two key heads, each for two query heads
    total = sum(query.T @ key for query, key in zip(projections.query, projections.key, strict=True))
    product = backbone.host().query_key
    assert product is not None
    torch.testing.assert_close(product(), total, rtol=1e-4, atol=1e-4)
    attention = backbone.model.model.layers[0].self_attn
    assert torch.equal(projections.key[1], attention.k_proj.weight[:8])
    assert torch.equal(projections.key[2], attention.k_proj.weight[8:])


def test_query_key_unknown_layout_is_rejected() -> None:
    config = transformers.FNetConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    config.num_attention_heads = 1
    with pytest.raises(ValueError, match="fnet has no attention with query and key projections of a known layout"):
        query_key(transformers.AutoModel.from_config(config))
