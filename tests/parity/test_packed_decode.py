"""Decoding with copies of the weights: the products, and the logits of a model with the dequantized weights."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers

from softprompt import Backbone, attach
from softprompt.backbones.kernels import packed_linear
from softprompt.backbones.kernels.packed_linear import Int4Linear, Int8Linear, PackedLinear, PrepackedLinear
from softprompt.models.causal import Causal
from softprompt.prompts import Folded

KINDS = pytest.mark.parametrize("kind", ["int8", "int4"])
ALL_KINDS = pytest.mark.parametrize("kind", ["prepacked", "int8", "int4"])
PACK: dict[str, Callable[[torch.Tensor], PackedLinear]] = {
    "prepacked": PrepackedLinear.pack,
    "int8": Int8Linear.pack,
    "int4": Int4Linear.pack,
}
TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
MORE = [[20, 21, 22], [23, 24, 25], [26, 27, 28]]


def dequantize_int8(weight: torch.Tensor) -> torch.Tensor:
    """Channel by channel, in double precision."""
    rows = []
    for row in weight.double():
        scale = (row.abs().max() / 127).bfloat16().double()
        rows.append((row / scale).round().clamp(-127, 127) * scale)
    return torch.stack(rows)


def dequantize_int4(weight: torch.Tensor) -> torch.Tensor:
    """Group by group, in double precision."""
    groups = []
    for group in weight.double().reshape(-1, 32):
        scale = ((group.max() - group.min()) / 15).bfloat16().double()
        offset = (group.min() + 8 * scale).bfloat16().double()
        groups.append((((group - offset) / scale).round() + 8).clamp(0, 15).sub(8) * scale + offset)
    return torch.stack(groups).reshape(weight.shape)


@ALL_KINDS
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize("shape", [(48, 32), (16, 96)])
def test_product_equals_explicitly_dequantized_weights(kind: str, rows: int, shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(shape, generator=draw).bfloat16() * torch.logspace(-3, 1, shape[0])[:, None].bfloat16()
    inputs = torch.randn(rows, shape[1], generator=draw).bfloat16()
    reference = {"prepacked": torch.Tensor.double, "int8": dequantize_int8, "int4": dequantize_int4}[kind](weight)
    packed = PACK[kind](weight)
    expected = inputs.double() @ reference.T
    scale = expected.abs().amax(0).clamp(min=1e-9)
    assert float(((packed(inputs).double() - expected) / scale).abs().max()) < 2**-7
    exact = 2**-8 if kind == "int4" else 0  # read back through the kernel, in bfloat16
    assert float((packed.dequantized().double() - reference).abs().max() / reference.abs().max()) <= exact


@ALL_KINDS
def test_zero_channels_stay_zero(kind: str) -> None:
    weight = torch.randn(16, 32).bfloat16()
    weight[3] = 0
    output = PACK[kind](weight)(torch.randn(2, 32).bfloat16())
    assert output.isfinite().all()
    assert (output[:, 3] == 0).all()


@pytest.fixture(params=["llama", "qwen2"])
def backbone(request: pytest.FixtureRequest, tiny_backbone: Callable[[str], Backbone]) -> Backbone:
    """Of sizes that 4 bits take, in bfloat16; Qwen2 has biases. Large weights, so that quantization shows."""
    source = tiny_backbone("llama")
    sizes: dict[str, Any] = {name: getattr(source.model.config, name) for name in ("bos_token_id", "eos_token_id")}
    sizes |= {"vocab_size": source.vocab_size, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15}
    config = transformers.LlamaConfig(**sizes) if request.param == "llama" else transformers.Qwen2Config(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
    if request.param == "qwen2":
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                torch.nn.init.normal_(projection.bias)
    return Backbone(model, source.tokenizer, request.param, request.param, "causal")


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[2] * (width - len(text)) + text for text in texts])
    return ids, torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])


def decoded(backbone: Backbone, prompts: list[Folded], prompted: Any = None) -> torch.Tensor:
    """The logits of three decode steps, over rows of different lengths and prompts: `[row, step, vocab]`."""
    prompted = prompted or attach(backbone, None)
    assert isinstance(prompted, Causal)
    state = prompted.prefill(*padded(TEXTS), prompts=prompted.prepare(prompts), index=torch.tensor([1, 0, 1]))
    steps = []
    for number in range(3):
        state = prompted.decode(state.with_room(2), torch.tensor([[row[number]] for row in MORE]))
        steps.append(state.logits[:, -1].float())
    return torch.stack(steps, 1)


@torch.no_grad()
def reference(backbone: Backbone, packed: Backbone, prompts: list[Folded]) -> torch.Tensor:
    """transformers in float32: prompt and text with the model's own weights, each further token with the packed."""
    assert packed.packed is not None
    own, quantized = copy.deepcopy(backbone.model).float(), copy.deepcopy(backbone.model).float()
    names = {module: name for name, module in backbone.model.named_modules()}
    for module, name in names.items():
        if isinstance(module, torch.nn.Linear):
            kind = "int8" if packed.packed.kind == "int4" and name == "lm_head" else packed.packed.kind
            quantized.get_submodule(name).weight = torch.nn.Parameter(PACK[kind](module.weight).dequantized())
    embed, rows = own.get_input_embeddings(), []
    for text, more, index in zip(TEXTS, MORE, [1, 0, 1], strict=True):
        embeds = torch.cat([prompts[index].prompt().bfloat16().float(), embed(torch.tensor(text))])[None]
        cache, logits = own(inputs_embeds=embeds, use_cache=True).past_key_values, []
        for token in more:
            output = quantized(inputs_embeds=embed(torch.tensor([[token]])), past_key_values=cache, use_cache=True)
            logits.append(output.logits[0, -1])
        rows.append(torch.stack(logits))
    return torch.stack(rows)


@ALL_KINDS
@torch.no_grad()
def test_decoded_logits_equal_a_model_with_dequantized_weights(kind: Any, backbone: Backbone) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = [Folded(backbone.host().sample(length, draw)) for length in (4, 2)]
    packed = backbone.with_decode_weights(kind)
    expected, actual = reference(backbone, packed, prompts), decoded(packed, prompts)
    error = float((actual - expected).norm() / expected.norm())
    assert error < 0.015  # bfloat16 rounding
    if kind != "prepacked":
        assert float((decoded(backbone, prompts) - expected).norm() / expected.norm()) > 1.3 * error


@ALL_KINDS
@torch.no_grad()
def test_prefill_and_scores_use_the_models_own_weights(kind: Any, backbone: Backbone) -> None:
    own, packed = (attach(backbone.with_decode_weights(name), None) for name in ("original", kind))
    ids, mask = padded(TEXTS)
    assert torch.equal(own(ids, mask).logits, packed(ids, mask).logits)
    candidates = [(5,), (6, 7), (6, 8, 9)]
    assert torch.equal(own.score(ids, mask, candidates), packed.score(ids, mask, candidates))
    first = [next(iter(prompted.generate(ids, mask, max_new_tokens=1, stop=()))) for prompted in (own, packed)]
    assert torch.equal(*first)


@pytest.mark.parametrize("decode_weights", ["auto", "prepacked", "int8"])
def test_generation_decodes_with_packed_weights(
    decode_weights: Any, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed products are exchanged for ones that give zeros, and so token 0; the first is of the own weights."""
    for kind in (PrepackedLinear, Int8Linear):
        monkeypatch.setattr(kind, "__call__", lambda self, inputs: inputs.new_zeros(len(inputs), _outputs(self)))
    ids, mask = padded(TEXTS)
    packed = attach(backbone.with_decode_weights(decode_weights), None)
    tokens = torch.stack(list(packed.generate(ids, mask, max_new_tokens=4, stop=())), 1)
    assert (tokens[:, 1:] == 0).all()
    assert bool((tokens[:, 0] != 0).any()) == (decode_weights == "int8")
    own = attach(backbone.with_decode_weights("original"), None)
    assert (torch.stack(list(own.generate(ids, mask, max_new_tokens=4, stop=())), 1)[:, 1:] != 0).any()


def _outputs(packed: PackedLinear) -> int:
    return len(packed.dequantized())


@torch.no_grad()
def test_float32_copies_are_exact(tiny_backbone: Callable[[str], Backbone]) -> None:
    backbone = tiny_backbone("llama")
    prompts = [Folded(backbone.host().sample(length, torch.Generator().manual_seed(0))) for length in (4, 2)]
    own, prepacked = (backbone.with_decode_weights(kind) for kind in ("original", "prepacked"))
    torch.testing.assert_close(decoded(prepacked, prompts), decoded(own, prompts), rtol=1e-5, atol=1e-5)
    assert prepacked.packed is not None
    assert prepacked.packed.is_exact
    assert own.packed is None


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "replaced", "data in place", "data replaced"])
def test_changed_weight_is_packed_again(change: str, backbone: Backbone) -> None:
    prompts = [Folded(backbone.host().sample(length, torch.Generator().manual_seed(0))) for length in (4, 2)]
    before = decoded(backbone, prompts)
    projection = backbone.model.model.layers[1].mlp.down_proj
    if change == "in place":
        projection.weight.copy_(-projection.weight)
    elif change == "data in place":  # as PEFT merges an adapter; torch does not count it
        projection.weight.data *= -1
    elif change == "data replaced":
        projection.weight.data = -projection.weight.data
    else:
        replacement = torch.nn.Parameter(-projection.weight, requires_grad=False)
        for _ in range(projection.weight._version - replacement._version):
            replacement.add_(0)  # changed in place as often as the weight it replaces
        projection.weight = replacement
    after = decoded(backbone, prompts)
    assert float((after - before).norm() / before.norm()) > 0.1
    expected = reference(backbone, backbone, prompts)
    assert float((after - expected).norm() / expected.norm()) < 0.015


@torch.no_grad()
@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_adapter_put_in_after_attach_takes_part(kind: Any, backbone: Backbone) -> None:
    prompts = [Folded(backbone.host().sample(length, torch.Generator().manual_seed(0))) for length in (4, 2)]
    prompted = attach(backbone.with_decode_weights(kind), None)
    before = decoded(backbone, prompts, prompted)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, backbone.model)
    after, expected = decoded(backbone, prompts, prompted), decoded(backbone.with_decode_weights("original"), prompts)
    assert float((expected - before).norm() / before.norm()) > 0.1
    assert float((after - expected).norm() / expected.norm()) < (0.1 if kind == "int8" else 0.03)


@KINDS
def test_layers_with_hooks_are_not_quantized(kind: Any, backbone: Backbone) -> None:
    backbone.model.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, output: -output)
    with pytest.raises(
        ValueError, match=f"decode_weights is '{kind}', but model.layers.1.mlp.down_proj is not a plain"
    ):
        backbone.with_decode_weights(kind)
    assert backbone.packed is None


@torch.no_grad()
def test_decoding_model_is_copied_pickled_and_cast(backbone: Backbone) -> None:
    prompts = [Folded(backbone.host().sample(length, torch.Generator().manual_seed(0))) for length in (4, 2)]
    before = decoded(backbone, prompts)
    for again in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        torch.testing.assert_close(decoded(again, prompts), before)
    for dtype in (torch.float32, torch.float64):  # float64 has no packed product
        backbone.model.to(dtype)
        assert float((decoded(backbone, prompts) - before).norm() / before.norm()) < 0.03


@torch.no_grad()
def test_layers_with_the_same_inputs_share_a_product(backbone: Backbone) -> None:
    assert backbone.packed is not None
    attention = backbone.model.model.layers[0].self_attn
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = (attention.q_proj, attention.k_proj, attention.v_proj)
    expected = torch.cat([layer(inputs) for layer in layers], 1)
    torch.testing.assert_close(backbone.packed(inputs, *layers), expected, rtol=2**-7, atol=2**-7)


def test_large_copies_are_made_on_request_only(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backbone.packed is not None
    size = packed_linear.packed_size(backbone.model)
    for limit, is_packed in ((size, True), (size - 1, False)):
        monkeypatch.setattr(packed_linear, "AUTO_LIMIT", limit)
        assert (backbone.with_decode_weights("auto").packed is not None) == is_packed
        assert backbone.with_decode_weights("prepacked").packed is not None


def test_other_models_are_refused_by_name(
    backbone: Backbone, tiny_backbone: Callable[[str], Backbone], unchecked: None
) -> None:
    for name in ("gpt2", "t5", "bert"):
        with pytest.raises(ValueError, match=r"decode_weights is 'int8', but .* is a .* in float32 on cpu"):
            tiny_backbone(name).with_decode_weights("int8")
        with pytest.raises(ValueError, match=r"decode_weights is 'prepacked', but .* float32 or bfloat16 on a CPU"):
            tiny_backbone(name).with_decode_weights("prepacked")
        assert tiny_backbone(name).packed is None
    with pytest.raises(ValueError, match="in float32 on cpu"):
        tiny_backbone("llama").with_decode_weights("int8")
    with pytest.raises(ValueError, match="decode_weights is 'int2'; it must be auto, original, prepacked, int8, int4"):
        backbone.with_decode_weights("int2")  # type: ignore[arg-type]
    narrow = copy.deepcopy(backbone.model)
    narrow.model.layers[0].mlp.down_proj = torch.nn.Linear(40, 64, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="down_proj has 40 inputs and 64 outputs, which must be multiples of 16"):
        Backbone(narrow, backbone.tokenizer, "narrow", "narrow", "causal").with_decode_weights("int8")


def test_generation_under_autocast_needs_exact_weights(backbone: Backbone) -> None:
    ids, mask = padded(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(list(attach(backbone, None).generate(ids, mask, max_new_tokens=2, stop=()))) == 2
        prompted = attach(backbone.with_decode_weights("int8"), None)
        with pytest.raises(ValueError, match="without gradients, autocast, or hooks"):
            list(prompted.generate(ids, mask, max_new_tokens=2, stop=()))
