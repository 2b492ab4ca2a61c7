"""A GGUF export, read by transformers, equals the live runs; llama.cpp itself runs it in tests/engines."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from softprompt import Run
from softprompt.backbones import Backbone
from softprompt.export import export_runs
from softprompt.export.gguf import Gguf
from softprompt.export.gguf_writer import GgufType, gguf_refusal, pre_tokenizer_name

MakeRun = Callable[..., Run]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_float32_file_equals_live_runs(
    kind: str, made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = tiny_backbone(kind)
    trained = [made(backbone, "dpt"), made(backbone, "plain")]
    report = export_runs(trained, Gguf("f32"), tmp_path / "out", backbone=backbone)
    assert report["prompts"] == {"dpt": 11, "plain": 5}
    assert report["largest_difference"] < 1e-4
    assert (tmp_path / "out" / "client.py").is_file()


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types_keep_the_prompt(
    kind: GgufType, made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = tiny_backbone("llama")
    run = made(backbone, "dpt")
    export_runs([run], Gguf(kind), tmp_path / "out", backbone=backbone)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert tensors["token_embd.weight"].tensor_type.name == {"q8_0": "F16"}.get(kind, kind.upper())
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    table = torch.from_numpy(
        gguf.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    )
    prompt = run.prompt(backbone).prompt().detach()
    torch.testing.assert_close(table[-11:], prompt, rtol=2**-8 if kind == "bf16" else 2**-11, atol=1e-6)


def test_llama3_positions_have_their_factors(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """The divisors equal transformers' own frequencies."""
    llama = tiny_backbone("llama")
    config = type(llama.model.config)(**{**llama.model.config.to_dict(), "rope_parameters": LLAMA3})
    backbone = Backbone(transformers.AutoModelForCausalLM.from_config(config), llama.tokenizer, "l3", "l3", "causal")
    export_runs([made(backbone, "plain")], Gguf("f32"), tmp_path / "out", backbone=backbone)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    factors = next(torch.from_numpy(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    plain = 1.0 / 500.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, backbone.model.model.rotary_emb.inv_freq)


def test_modelfile_has_the_prompt_before_the_text(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = tiny_backbone("llama")
    names = {"plain": "<ticket>"}
    export_runs([made(backbone, "plain")], Gguf(), tmp_path / "out", backbone=backbone, token_names=names)
    usage = json.loads((tmp_path / "out" / "prompts.json").read_text())
    text = (tmp_path / "out" / "plain.Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./model.gguf"
    assert 'TEMPLATE """<ticket-0><ticket-1><ticket-2><ticket-3><ticket-4><s>{{ .Prompt }}"""' in text
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert [tokens[index] for index in usage["prompts"]["plain"]["ids"]] == [f"<ticket-{row}>" for row in range(5)]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_differing_file_is_dropped(
    made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: query and key weights left in transformers' order."""
    backbone = tiny_backbone("llama")
    run = made(backbone, "plain")
    monkeypatch.setattr("softprompt.export.gguf_writer._interleaved", lambda tensor, heads: tensor)
    with pytest.raises(ValueError, match="the GGUF file gives other scores than the live run"):
        export_runs([run], Gguf("f32"), tmp_path / "out", backbone=backbone)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("kind", "method", "key"),
    [
        ("llama", "add_rope_freq_base", "llama.rope.freq_base"),
        ("llama", "add_layer_norm_rms_eps", "llama.attention.layer_norm_rms_epsilon"),
        ("llama", "add_rope_dimension_count", "llama.rope.dimension_count"),
        ("qwen3", "add_head_count_kv", "qwen3.attention.head_count_kv"),
        ("gpt2", "add_layer_norm_eps", "gpt2.attention.layer_norm_epsilon"),
        ("gpt2", "add_context_length", "gpt2.context_length"),
        ("gpt2", "add_eos_token_id", "tokenizer.ggml.eos_token_id"),
    ],
)
@pytest.mark.parametrize("fault", ["wrong", "missing"])
def test_wrong_metadata_are_dropped(
    kind: str,
    method: str,
    key: str,
    fault: str,
    made: MakeRun,
    tiny_backbone: Callable[[str], Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A planted fault in the file alone: what llama.cpp computes with, and transformers would not show."""
    backbone, write = tiny_backbone(kind), getattr(gguf.GGUFWriter, method)
    planted = (lambda writer, value: write(writer, 2 * value + 1)) if fault == "wrong" else (lambda writer, value: None)
    monkeypatch.setattr(gguf.GGUFWriter, method, planted)
    with pytest.raises(ValueError, match=rf"the GGUF file has {re.escape(key)} = .* and the model .* is dropped"):
        export_runs([made(backbone, "plain")], Gguf("f32"), tmp_path / "out", backbone=backbone)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx=True, .* with False"),
        ("gpt2", {"scale_attn_weights": False}, "has scale_attn_weights=False, but llama.cpp runs gpt2 models"),
        ("gpt2", {"activation_function": "relu"}, "has activation_function='relu', .* with 'gelu_new' or"),
        ("gpt2", {"add_cross_attention": True}, "has add_cross_attention=True"),
        ("llama", {"hidden_act": "gelu"}, "has hidden_act='gelu', but llama.cpp runs llama models with 'silu' or"),
        ("mistral", {"hidden_act": "relu"}, "has hidden_act='relu'"),
        ("qwen3", {"hidden_act": "gelu_new"}, "has hidden_act='gelu_new'"),
        ("qwen3", {"attention_bias": True}, "has attention_bias=True"),
        ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "rotary positions of 0.5 of each"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rotary positions of type linear"),
    ],
)
def test_models_that_llama_cpp_would_run_otherwise_are_refused(
    kind: str, settings: dict[str, Any], message: str, tiny_backbone: Callable[[str], Backbone]
) -> None:
    backbone = tiny_backbone(kind)
    config = copy.deepcopy(backbone.model.config)
    for name, value in settings.items():
        setattr(config, name, value)
    refusal = gguf_refusal(SimpleNamespace(config=config), backbone.tokenizer)
    assert re.search(f"{message}.*; export to vocab, and (run|convert) that with", refusal), refusal


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt2", {"activation_function": "gelu_pytorch_tanh"}), ("llama", {"attention_bias": True, "mlp_bias": True})],
)
def test_settings_that_llama_cpp_knows_are_exported(
    kind: str, settings: dict[str, Any], made: MakeRun, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    own = tiny_backbone(kind)
    config = type(own.model.config)(**{**own.model.config.to_dict(), **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, values in model.named_parameters():
        if name.endswith("bias"):  # zeros at first
            torch.nn.init.normal_(values, generator=torch.Generator().manual_seed(0))
    backbone = Backbone(model, own.tokenizer, kind, kind, "causal")
    report = export_runs([made(backbone, "plain")], Gguf("f32"), tmp_path / "out", backbone=backbone)
    assert report["largest_difference"] < 1e-4


def _tokenizer(*steps: Any) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pre_tokenizers_have_llama_cpps_names() -> None:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    after_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )

    def split(pattern: str) -> Any:
        return pre_tokenizers.Split(Regex(pattern), "isolated")

    assert pre_tokenizer_name(_tokenizer(by_bytes)) == "gpt-2"
    assert pre_tokenizer_name(_tokenizer(digits, by_bytes)) == "smollm"
    assert pre_tokenizer_name(_tokenizer(split(llama3), after_split)) == "llama-bpe"
    assert pre_tokenizer_name(_tokenizer(split(llama3.replace("{1,3}", "")), after_split)) == "qwen2"
    assert pre_tokenizer_name(_tokenizer(split(r"\p{N}+"), after_split)) is None
    assert pre_tokenizer_name(_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert pre_tokenizer_name(_tokenizer(pre_tokenizers.Metaspace())) is None
