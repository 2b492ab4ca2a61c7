"""A row's result does not depend on its neighbors: made right for a model, or the model is refused by name."""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from cases import assert_near, padded, rows_of
from torch import Tensor, nn

from softprompt.backbones import Architecture, Backbone
from softprompt.models import PromptedModel, attach, fresh_head, verify
from softprompt.models.config_checks import sliding_window
from softprompt.prompts import Folded
from softprompt.serve.engine.kv_cache import CachedDecoder, Row
from softprompt.types import PromptPosition

BASE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT: dict[str, Any] = {"vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 256}
MPT: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 256,
    "expansion_ratio": 2,
}
FALCON: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT: dict[str, Any] = {
    **BASE,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
PARTS: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
    **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
}
T5: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

DECODERS: dict[str, Callable[[], Any]] = {
    "mpt": lambda: transformers.MptConfig(**MPT),
    "falcon_alibi": lambda: transformers.FalconConfig(**FALCON, alibi=True),
    "falcon": lambda: transformers.FalconConfig(**FALCON, alibi=False),
    "gptj": lambda: transformers.GPTJConfig(**GPT, rotary_dim=4),
    "codegen": lambda: transformers.CodeGenConfig(**GPT, rotary_dim=4),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(**GPT),
    "biogpt": lambda: transformers.BioGptConfig(**BASE),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**LATENT, **EXPERTS),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**LATENT, **EXPERTS),
    "minicpm3": lambda: transformers.MiniCPM3Config(**LATENT),
    "mixtral": lambda: transformers.MixtralConfig(**BASE, num_key_value_heads=2, num_local_experts=4),
}
"""Positions by column, by mask, rotary, learned; one key-value head for all; values narrower than keys; experts."""

SHORT, LONG = (7, 100, 200, 40), 40


TOKENIZER = SimpleNamespace(all_special_ids=[0, 1, 2], eos_token_id=1, sep_token_id=1, mask_token_id=3)


def backbone_of(config: Any, architecture: Architecture, by: float = 4) -> Backbone:
    kinds = {"causal": transformers.AutoModelForCausalLM, "encoder_decoder": transformers.AutoModelForSeq2SeqLM}
    torch.manual_seed(0)
    model = kinds.get(architecture, transformers.AutoModel).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim == 2:
                weights *= by  # as initialized, attention is all but uniform and a wrong position would hardly show
    return Backbone(model, TOKENIZER, config.model_type, config.model_type, architecture)


def prompt_of(backbone: Backbone, length: int, seed: int = 1) -> Folded:
    draw = torch.Generator().manual_seed(seed)
    return Folded(torch.randn(length, backbone.dim, generator=draw) * backbone.host().rms)


@torch.no_grad()
def single_row(backbone: Backbone, prompt: Folded, text: Tensor, lead: int = 0) -> Tensor:
    """The model's own logits of one row with its prompt behind the first `lead` tokens."""
    own = backbone.model.get_input_embeddings()(text)
    embeds = torch.cat([own[:lead], prompt.prompt(), own[lead:]])[None]
    logits: Tensor = backbone.model(inputs_embeds=embeds).logits[0]
    return logits


def beside(prompted: PromptedModel, width: int) -> tuple[Tensor, Tensor]:
    """A short row and one of `width` tokens, as one batch padded in front."""
    rows = [torch.tensor(SHORT), *rows_of((width,), first=3)]
    return padded(rows, "left", 0)


@pytest.fixture(scope="module", params=DECODERS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return backbone_of(DECODERS[request.param](), "causal")


@pytest.mark.parametrize("width", [4, 5, 9, LONG])
def test_decoder_row_does_not_depend_on_neighbors(backbone: Backbone, width: int) -> None:
    prompt = prompt_of(backbone, 5)
    prompted, text = attach(backbone, prompt), torch.tensor(SHORT)
    ids, mask = beside(prompted, width)
    expected = single_row(backbone, prompt, text)[4:]
    assert_near(prompted(ids, mask).logits[0, -4:], expected[1:])
    labels = torch.where(mask == 1, ids, -100)
    labels[1:] = -100
    loss = nn.functional.cross_entropy(expected[:-1], text)
    assert_near(prompted(ids, mask, labels).loss, loss)
    with torch.no_grad():
        scores = prompted.score(ids, mask, [(9, 11, 12), (5,)])[0]
        longer = single_row(backbone, prompt, torch.tensor([*SHORT, 9, 11, 12]))[8:].log_softmax(-1)
    assert_near(scores, torch.stack([longer[0, 9] + longer[1, 11] + longer[2, 12], longer[0, 5]]))


def test_decoder_gradient_matches_single_rows(backbone: Backbone) -> None:
    prompt = nn.Parameter(prompt_of(backbone, 5).prompt())
    folded = Folded(prompt.detach())
    folded.matrix = prompt  # type: ignore[assignment]
    ids, mask = beside(attach(backbone, folded), LONG)
    labels = torch.where(mask == 1, ids, -100)
    labels[1:] = -100
    [ours] = torch.autograd.grad(attach(backbone, folded)(ids, mask, labels).loss, [prompt])
    own = backbone.model.get_input_embeddings()(torch.tensor(SHORT))
    logits = backbone.model(inputs_embeds=torch.cat([prompt, own])[None]).logits[0, 4:-1]
    [theirs] = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor(SHORT)), [prompt])
    assert float(theirs.abs().max()) > 0
    assert_near(ours, theirs, 1e-4)


@pytest.mark.parametrize("position", ["prefix", "after_bos", "suffix"])
def test_decoder_generates_as_single_rows(backbone: Backbone, position: PromptPosition) -> None:
    prompt = prompt_of(backbone, 5)
    prompted = attach(backbone, prompt, prompt_position=position)
    ids, mask = beside(prompted, LONG)
    made = torch.stack(list(prompted.generate(ids, mask, max_new_tokens=6, stop=[])), 1)[0]
    lead = {"prefix": 0, "after_bos": 1, "suffix": len(SHORT)}[position]
    expected = single_row(backbone, prompt, torch.cat([torch.tensor(SHORT), made]), lead)[-7:-1].argmax(-1)
    assert torch.equal(made, expected)


@torch.no_grad()
def test_serving_rows_join_and_leave_exactly(backbone: Backbone) -> None:
    decoder = CachedDecoder(attach(backbone))
    first, second = prompt_of(backbone, 5), prompt_of(backbone, 2, 2)
    short, long = torch.tensor(SHORT), rows_of((LONG,), first=3)[0]
    read, _ = decoder.prefill(
        [
            Row(long.tolist(), first, decoder.kv_prefix(first)),
            Row(short.tolist(), second, decoder.kv_prefix(second)),
        ]
    )
    decoder.decode_next(read, torch.tensor([50, 60]))
    late, _ = decoder.prefill([Row(short.tolist(), first, decoder.kv_prefix(first))])
    logits = decoder.decode_next(decoder.concat([(read, 1), (late, 0)]), torch.tensor([70, 80]))
    expected = [
        single_row(backbone, second, torch.tensor([*SHORT, 60, 70]))[-1],
        single_row(backbone, first, torch.tensor([*SHORT, 80]))[-1],
    ]
    assert_near(logits, torch.stack(expected))


@pytest.mark.parametrize("by", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_counting_model_runs_prompts_in_row(by: float, dtype: torch.dtype) -> None:
    """Whatever the size of its weights: small logits differ by little, and bfloat16 rounds."""
    backbone = backbone_of(transformers.MptConfig(**MPT), "causal", by=by)
    prompted: Any = attach(Backbone(backbone.model.to(dtype), TOKENIZER, "mpt", "mpt", "causal"))
    assert prompted.layout == "inline"
    assert not prompted.supports_prefix_sharing


ENCODERS: dict[str, Callable[[], Any]] = {
    "longformer": lambda: transformers.LongformerConfig(**BASE, attention_window=8),
    "modernbert": lambda: transformers.ModernBertConfig(**BASE, local_attention=8, cls_token_id=0, sep_token_id=1),
    "deberta_v2": lambda: transformers.DebertaV2Config(**BASE, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "albert": lambda: transformers.AlbertConfig(**BASE, embedding_size=16),
    "electra": lambda: transformers.ElectraConfig(**BASE),
    "xlm": lambda: transformers.XLMConfig(vocab_size=300, emb_dim=32, n_layers=2, n_heads=4),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_row_does_not_depend_on_longer_neighbor(name: str) -> None:
    backbone = backbone_of(ENCODERS[name](), "encoder")
    head = fresh_head(backbone, 3, torch.Generator().manual_seed(0))
    prompted = attach(backbone, prompt_of(backbone, 5), head=head)
    ids, mask = beside(prompted, LONG)
    short = torch.tensor([SHORT])
    assert_near(prompted(ids, mask).logits[:1], prompted(short, torch.ones_like(short)).logits)


ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "led": lambda: transformers.LEDConfig(**PARTS, attention_window=8),
    "long_t5": lambda: transformers.LongT5Config(**T5, local_radius=4),
    "long_t5_global": lambda: transformers.LongT5Config(
        **T5, local_radius=4, global_block_size=4, encoder_attention_type="transient-global"
    ),
    "pegasus": lambda: transformers.PegasusConfig(**PARTS, max_position_embeddings=256),
    "umt5": lambda: transformers.UMT5Config(**T5),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_row_ignores_longer_neighbor(name: str) -> None:
    backbone = backbone_of(ENCODER_DECODERS[name](), "encoder_decoder")
    prompted = attach(backbone, prompt_of(backbone, 5))
    ids, mask = beside(prompted, LONG)
    labels, short = torch.tensor([[9, 11, 1]] * 2), torch.tensor([SHORT])
    actual = prompted(ids, mask, labels).logits[0]
    assert_near(actual, prompted(short, torch.ones_like(short), labels[:1]).logits[0])


REFUSED: dict[str, tuple[Architecture, Callable[[], Any], str]] = {
    "nystromformer": (
        "encoder",
        lambda: transformers.NystromformerConfig(**BASE, segment_means_seq_len=64, num_landmarks=16),
        "landmarks",
    ),
    "convbert": ("encoder", lambda: transformers.ConvBertConfig(**BASE), "padding after the row"),
    "fnet": ("encoder", lambda: transformers.FNetConfig(**BASE), "padding after the row"),
    "yoso": ("encoder", lambda: transformers.YosoConfig(**BASE), "padding after the row"),
    "big_bird": ("encoder", lambda: transformers.BigBirdConfig(**BASE), "block-sparse"),
    "reformer": ("encoder", lambda: transformers.ReformerConfig(vocab_size=300, axial_pos_embds=False), "chunks"),
    "bigbird_pegasus": ("encoder_decoder", lambda: transformers.BigBirdPegasusConfig(**PARTS), "block-sparse"),
    "switch_transformers": (
        "encoder_decoder",
        lambda: transformers.SwitchTransformersConfig(**T5, num_experts=4),
        "experts of limited capacity",
    ),
    "prophetnet": (
        "encoder_decoder",
        lambda: transformers.ProphetNetConfig(
            vocab_size=300,
            hidden_size=32,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            **{f"num_{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"num_{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        ),
        "padding after the row",
    ),
    "mamba": ("causal", lambda: transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2), "mamba"),
    "xlnet": (
        "causal",
        lambda: transformers.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=64),
        "past_key_values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_with_dependent_rows_is_refused_by_name(name: str) -> None:
    architecture, config, why = REFUSED[name]
    backbone = backbone_of(config(), architecture)
    head = fresh_head(backbone, 2, torch.Generator()) if architecture == "encoder" else None
    with pytest.raises(ValueError, match=rf"{name}.*{why}"):
        attach(backbone, head=head)


def ignoring_positions(cached_only: bool, several_only: bool = False) -> Backbone:
    """A Llama that counts columns, although it takes positions: always, or only where there is a cache."""
    backbone = backbone_of(transformers.LlamaConfig(**BASE), "causal")
    forward = backbone.model.forward

    def by_column(
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        logits_to_keep: Any = 0,
        **others: Any,
    ) -> Any:
        template_prefix = past_key_values is not None and past_key_values.get_seq_length() > 0
        if (template_prefix or not cached_only) and (len(inputs_embeds) > 1 or not several_only):
            position_ids = None
        return forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **others,
        )

    backbone.model.forward = by_column
    return backbone


@pytest.mark.parametrize("cached_only", [False, True])
def test_model_ignoring_positions_is_refused(cached_only: bool) -> None:
    with pytest.raises(ValueError, match=r"llama \(llama\) gives different (logits|scores) with a shared prefix"):
        attach(ignoring_positions(cached_only))


@pytest.mark.parametrize(("wrong", "passes"), [(range(0), True), (range(7, 8), True), (range(3), False)])
def test_in_bfloat16_a_single_position_may_be_far_off_and_a_row_may_not(wrong: range, passes: bool) -> None:
    backbone = backbone_of(transformers.LlamaConfig(**BASE), "causal")
    backbone.model.bfloat16()
    draw = torch.Generator().manual_seed(0)
    expected, other = torch.randn(2, 38, 300, generator=draw)
    actual = expected + 0.05 * torch.randn(38, 300, generator=draw)
    actual[list(wrong)] = other[list(wrong)]
    assert verify.is_close(backbone, expected, actual) == passes


def test_cached_decoder_runs_its_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the attachment does not do, rows that join, may be wrong where all else is right."""
    prompted = attach(backbone_of(transformers.LlamaConfig(**BASE), "causal"))
    right = CachedDecoder.concat

    def wrong(self: CachedDecoder, *args: Any) -> Any:
        batch = right(self, *args)
        batch.mask = torch.ones_like(batch.mask)
        return batch

    monkeypatch.setattr(CachedDecoder, "concat", wrong)
    with pytest.raises(ValueError, match="rows that join and leave a batch"):
        CachedDecoder(prompted)


def test_failing_model_is_refused_with_its_error() -> None:
    backbone = backbone_of(transformers.LlamaConfig(**BASE), "causal")
    forward = backbone.model.forward

    def narrow(inputs_embeds: Any = None, past_key_values: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:
        if len(inputs_embeds) > 2:
            raise RuntimeError("at most two rows")
        return forward(
            inputs_embeds=inputs_embeds, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **others
        )

    narrow.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    backbone.model.forward = narrow
    with pytest.raises(ValueError, match=r"llama.*at most two rows.*choose another backbone"):
        attach(backbone)


def test_model_is_checked_once_until_forgotten() -> None:
    backbone, calls = backbone_of(transformers.LlamaConfig(**BASE), "causal"), list[int]()
    backbone.model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    attach(backbone)
    first = len(calls)
    assert first
    attach(backbone)
    assert len(calls) == first
    verify.forget(backbone.model)
    attach(backbone)
    assert len(calls) == 2 * first


def test_local_attention_is_a_sliding_window() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    )
    config.window_size = 16
    backbone = backbone_of(config, "causal")
    assert sliding_window(backbone) == 16
    with pytest.raises(ValueError, match="window of 16"):
        attach(backbone, prompt_of(backbone, 5))(torch.ones(1, 20, dtype=torch.long))
