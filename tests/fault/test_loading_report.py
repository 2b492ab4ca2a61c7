"""Checkpoints whose tensors, files, tokenizer or code do not match their config.json."""

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from softprompt import load_backbone
from softprompt.backbones import Backbone
from softprompt.types import LoadingWarning

from ..conftest import GROUPED, SIZES

Tensors = dict[str, torch.Tensor]
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def saved(backbone: Backbone, folder: Path) -> Path:
    backbone.model.save_pretrained(folder)
    if backbone.architecture != "vision":
        backbone.tokenizer.save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))


def load(folder: Path, dtype: Any = "float32") -> Backbone:
    return load_backbone(str(folder), dtype=dtype)


@pytest.fixture
def llama(tmp_path: Path, llama_folder: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "llama"))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("gpt2", "transformer.ln_f.weight"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.q.weight"),
        ("bert", "encoder.layer.0.attention.self.query.bias"),
        ("bert_mlm", "cls.predictions.transform.dense.weight"),
        ("vit", "embeddings.cls_token"),
    ],
)
def test_missing_tensor_is_named(tiny_backbone: Callable[[str], Backbone], tmp_path: Path, name: str, missing: str):
    folder = saved(tiny_backbone(name), tmp_path / name)
    assert missing in load_file(folder / "model.safetensors")
    change_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if key != missing})
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ tensors, which would be random.*{missing}"):
        load(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "base_model.model.", "module."])
def test_wrapper_prefix_is_named(llama: Path, prefix: str):
    change_tensors(llama, lambda tensors: {f"{prefix}{key}": value for key, value in tensors.items()})
    with pytest.raises(ValueError, match=rf"lacks 21 of 21 tensors.*begin with '{prefix}'"):
        load(llama)


@pytest.mark.parametrize(
    "extra", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.bias"]
)
def test_tensor_unknown_to_the_layers_is_rejected(llama: Path, extra: str):
    change_tensors(llama, lambda tensors: {**tensors, extra: torch.ones(32)})
    with pytest.raises(ValueError, match=f"has no place for .{extra}"):
        load(llama)


def test_unused_head_warns(llama: Path):
    change_tensors(llama, lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, 32)})
    with pytest.warns(LoadingWarning, match=r"holds 1 tensors that are not used here \(v_head.summary.weight\)"):
        load(llama)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "t5_1.1", "bart", "bert", "roberta_mlm", "vit", "dinov2"])
def test_saved_checkpoint_loads_without_warning(tiny_backbone: Callable[[str], Backbone], tmp_path: Path, name: str):
    folder = saved(tiny_backbone(name), tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoadingWarning)
        load(folder)


@pytest.mark.parametrize("name", ["bert", "roberta", "mpnet"])
def test_encoder_without_pooler_has_a_stable_hash(tiny_backbone: Callable[[str], Backbone], tmp_path: Path, name: str):
    folder = saved(tiny_backbone(name), tmp_path / name)
    change_tensors(folder, lambda tensors: {key: value for key, value in tensors.items() if "pooler" not in key})
    assert load(folder).hash == load(folder).hash


def test_mismatched_tensor_is_named_with_both_shapes(llama: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(llama, lambda tensors: {**tensors, name: tensors[name][:60].clone()})
    with pytest.raises(ValueError, match=rf"{name} of shape \(60, 32\), but its config.json makes it \(64, 32\)"):
        load(llama)


def test_gguf_without_a_tensor_is_rejected_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    writer = gguf.GGUFWriter(tmp_path / "cut.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(30)
    writer.add_tensor("token_embd.weight", np.ones((30, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"cut.gguf lacks \d+ of \d+ tensors"):
        load(tmp_path / "cut.gguf")
    assert not list((tmp_path / "cache").rglob("config.json"))


def write_code(folder: Path, ran: Path, file: str) -> None:
    (folder / file).write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nOwn = None\n")


@pytest.mark.parametrize("typed", ["", "y\n"])
@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForCausalLM", "AutoModel"])
def test_model_code_never_runs(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, auto: str, typed: str
):
    write_code(llama, llama / "RAN", "own.py")
    change_json(llama / "config.json", auto_map={auto: "own.Own"}, model_type="own")
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    with pytest.raises(ValueError, match=r"brings code of its own .*, which is never run"):
        load(llama)
    assert not capsys.readouterr().out
    assert not (llama / "RAN").exists()


def test_model_code_of_a_known_model_warns(llama: Path):
    write_code(llama, llama / "RAN", "own.py")
    change_json(llama / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    with pytest.warns(LoadingWarning, match="brings code of its own"):
        load(llama)
    assert not (llama / "RAN").exists()


def test_model_code_of_a_known_vision_model_warns(tiny_backbone: Callable[[str], Backbone], tmp_path: Path):
    folder = saved(tiny_backbone("vit"), tmp_path / "vit")
    write_code(folder, folder / "RAN", "own.py")
    change_json(folder / "config.json", auto_map={"AutoModel": "own.Own"})
    change_json(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.Own"})
    with pytest.warns(LoadingWarning, match="brings code of its own"):
        load(folder)
    assert not (folder / "RAN").exists()


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "OwnTokenizer"])
def test_tokenizer_code_never_runs(
    llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
):
    write_code(llama, llama / "RAN", "own.py")
    change_json(llama / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class=kind)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            load(llama)
        except ValueError as error:
            message = str(error)
        else:
            message = " ".join(str(warning.message) for warning in caught)
    assert "tokenizer" in message
    assert "code of its own" in message
    assert not capsys.readouterr().out
    assert not (llama / "RAN").exists()


def test_custom_generate_never_runs(llama: Path):
    (llama / "custom_generate").mkdir()
    write_code(llama / "custom_generate", llama / "RAN", "generate.py")
    load(llama)
    assert not (llama / "RAN").exists()


def test_hub_kernel_is_rejected(llama: Path):
    change_json(llama / "config.json", _attn_implementation="somebody/kernel")
    with pytest.raises(ValueError, match=r"names attention code to be downloaded .'somebody/kernel'"):
        load(llama)


def test_tokenizer_of_another_model_is_rejected(tmp_path: Path, tokenizer: Any):
    config = transformers.LlamaConfig(**{**GROUPED, "vocab_size": 280})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"has ids up to 299, but its embedding table has 280 rows"):
        load(tmp_path / "m")


def test_added_token_without_embedding_warns(llama: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.add_tokens(["<extra>"], special_tokens=True)
    tokenizer.save_pretrained(llama)
    with pytest.warns(LoadingWarning, match=r"outside the 300 rows of the embedding table \(<extra>\)"):
        load(llama)


def test_config_ids_unlike_the_tokenizers_warn(llama: Path):
    change_json(llama / "config.json", eos_token_id=7)
    with pytest.warns(LoadingWarning, match=r"says eos_token_id 7, but its tokenizer's is 1 \('</s>'\)"):
        load(llama)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
            "bitsandbytes fp4",
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "nf4"])
def test_unsupported_quantization_is_named(llama: Path, settings: dict[str, Any], method: str, dtype: str):
    change_json(llama / "config.json", quantization_config=settings)
    with pytest.raises(ValueError, match=rf"are quantized \({method}\), which is not supported"):
        load(llama, dtype)


def test_4bit_checkpoint_loads_as_nf4(tmp_path: Path, llama_folder: Path):
    pytest.importorskip("bitsandbytes")
    quantized = load(llama_folder, "nf4")
    quantized.model.save_pretrained(tmp_path / "bnb")
    quantized.tokenizer.save_pretrained(tmp_path / "bnb")
    with pytest.raises(ValueError, match=r"are in 4 bits already .*give --dtype nf4"):
        load(tmp_path / "bnb", "float32")
    ids, loaded = torch.arange(10, 20)[None], load(tmp_path / "bnb", "nf4")
    assert loaded.precision == "nf4"
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.model(ids).logits, quantized.model(ids).logits)


def test_truncated_file_is_named(llama: Path):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off or damaged .*fetch it again"):
        load(llama)


def test_git_lfs_pointer_is_named(llama: Path):
    (llama / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a pointer of Git LFS, .*fetch it again"):
        load(llama)


def sharded(folder: Path) -> list[Path]:
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    return shards


def test_missing_shard_is_named(llama: Path):
    shard = sharded(llama)[-1]
    load(llama)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is not there, but its index names it"):
        load(llama)


def test_truncated_shard_is_named(llama: Path):
    shard = sharded(llama)[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} is cut off or damaged"):
        load(llama)


def test_folder_without_weights_is_rejected(llama: Path):
    (llama / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights: it has neither model.safetensors nor"):
        load(llama)


def test_pickled_weights_load_safely(llama: Path, llama_folder: Path):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    assert load(llama).hash == load(llama_folder).hash
    (llama / "pytorch_model.bin").write_bytes((llama / "pytorch_model.bin").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"the weights of .* cannot be read"):
        load(llama)


def multimodal() -> dict[str, Any]:
    text = {**GROUPED, "hidden_size": 64}
    llama = transformers.LlamaConfig(**text)
    gemma = {**text, "head_dim": 16, "sliding_window": 128, "layer_types": ["full_attention"] * 2}
    clip = transformers.CLIPVisionConfig(**VISION)
    return {
        "gemma3": transformers.Gemma3Config(
            text_config=gemma, vision_config=VISION, mm_tokens_per_image=4, image_token_index=5
        ),
        "mistral3": transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**text, sliding_window=None),
            vision_config=transformers.PixtralVisionConfig(**VISION),
            image_token_index=5,
        ),
        "llava": transformers.LlavaConfig(text_config=llama, vision_config=clip, image_token_index=5),
        "llava_next": transformers.LlavaNextConfig(text_config=llama, vision_config=clip, image_token_index=5),
        "smolvlm": transformers.SmolVLMConfig(text_config=llama.to_dict(), vision_config=VISION, image_token_id=5),
        "idefics3": transformers.Idefics3Config(text_config=llama.to_dict(), vision_config=VISION, image_token_id=5),
    }


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava", "llava_next", "smolvlm", "idefics3"])
def test_text_model_of_a_multimodal_model_has_its_logits(tmp_path: Path, tokenizer: Any, name: str):
    torch.manual_seed(0)
    full = transformers.AutoModelForImageTextToText.from_config(multimodal()[name], dtype=torch.float32).eval()
    full.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    with pytest.warns(LoadingWarning, match="only its text model is loaded"):
        text_model = load(tmp_path / name)
    ids = torch.arange(10, 30)[None]
    torch.testing.assert_close(text_model.model(ids).logits, full(input_ids=ids).logits)


def test_multimodal_model_without_decoder_is_rejected(tmp_path: Path):
    config = transformers.CLIPConfig(
        text_config={**SIZES, "projection_dim": 32}, vision_config={**VISION, "projection_dim": 32}
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"\(clip\) is a model of text and images or sound, which are not taken"):
        load(tmp_path / "clip")
