"""Decoders as llama.cpp's GGUF files: Llama, Mistral, Qwen2, Qwen3 and GPT-2, with byte-level BPE tokenizers.

What llama.cpp's own `convert_hf_to_gguf.py` writes for these, from a loaded model, with the `gguf` package alone.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

GgufType = Literal["f16", "bf16", "q8_0", "f32"]
"""How the weight matrices are stored; vectors are always float32."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""transformers' model type -> llama.cpp's architecture."""

_TYPES: dict[GgufType, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {_SPLIT_PATTERN % r"\p{N}{1,3}": "llama-bpe", _SPLIT_PATTERN % r"\p{N}": "qwen2"}
"""Split pattern -> llama.cpp's name of the pre-tokenizer."""


_SILU, _TANH_GELU = ("silu", "swish"), ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
_ONLY_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": _SILU},
    "mistral": {"hidden_act": _SILU},
    "qwen2": {"hidden_act": _SILU},
    "qwen3": {"hidden_act": _SILU, "attention_bias": (False,)},
    "gpt2": {
        "activation_function": _TANH_GELU,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
}
"""Settings of a config that GGUF has no key for: what llama.cpp computes, under every name that transformers has."""
_CONVERT = "export to vocab, and convert that with llama.cpp's convert_hf_to_gguf.py"
_RUN_ELSEWHERE = "export to vocab, and run that with transformers or vLLM"


def gguf_refusal(model: Any, tokenizer: Any) -> str:
    """Why this writer or llama.cpp cannot express the model or its tokenizer, and what to do; empty where both can."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in ARCHITECTURES:
        return f"this writer has no {config.model_type} models, only {', '.join(ARCHITECTURES)}; {_CONVERT}"
    for setting, values in _ONLY_VALUES[config.model_type].items():
        if (value := getattr(config, setting)) not in values:
            return (
                f"the model has {setting}={value!r}, but llama.cpp runs {config.model_type} models with "
                f"{' or '.join(map(repr, values))} only; {_RUN_ELSEWHERE}"
            )
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        return f"this writer cannot express rotary positions of type {rope['rope_type']}; {_CONVERT}"
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        return f"this writer cannot express rotary positions of {share} of each head; {_CONVERT}"
    windows = getattr(config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in windows) or (not windows and getattr(config, "sliding_window", None)):
        return f"llama.cpp runs this architecture without a sliding window, which the model has; {_RUN_ELSEWHERE}"
    if pre_tokenizer_name(tokenizer) is None:
        return f"this writer has no name for its tokenizer's pre-tokenizer; {_CONVERT}"
    return ""


def pre_tokenizer_name(tokenizer: Any) -> str | None:
    """What llama.cpp calls the pre-tokenizer of a byte-level BPE; None for any other tokenizer."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    pre_tokenizer = parts["pre_tokenizer"] or {}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if parts["model"]["type"] != "BPE" or steps[-1].get("type") != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    match steps[:-1]:
        case []:
            return "gpt-2" if steps[-1]["use_regex"] else None
        case [{"type": "Digits", "individual_digits": True}]:
            return "smollm" if steps[-1]["use_regex"] else None
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]:
            return None if steps[-1]["use_regex"] else _PRE_TOKENIZERS.get(pattern)
    return None


def write_gguf(model: Any, tokenizer: Any, file: Path, name: str, kind: GgufType) -> None:
    """Write `model` and `tokenizer` as one GGUF file.

    The tokenizer adds no beginning of sequence by itself, because it comes after a prompt; the caller's rows have it.

    Args:
        model: as `gguf_refusal` accepts it.
        tokenizer: its tokenizer; special tokens become control tokens.
        file: the file to write.
        name: the model's name in the file.
        kind: dtype of the weight matrices. The embedding table of `q8_0` is float16, as prompts are in it.

    Raises:
        ValueError: a weight does not fit float16.
    """
    architecture = ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name(name)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, model.config, len(model.get_input_embeddings().weight))
    _add_tokenizer(writer, tokenizer, len(model.get_input_embeddings().weight))
    layers = model.config.num_hidden_layers
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), layers)
    transposed = {f"{module}.weight" for module, layer in model.named_modules() if isinstance(layer, Conv1D)}
    for name_, tensor in model.state_dict().items():
        gguf_name = names.get_name(name_, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"llama.cpp has no name for the weight {name_}; please report the backbone")
        tensor = tensor.detach().float().cpu()
        tensor = tensor.T if name_ in transposed else tensor
        if architecture == "llama" and ".q_proj." in name_:
            tensor = _interleaved(tensor, model.config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name_:
            tensor = _interleaved(tensor, model.config.num_key_value_heads)
        _add_tensor(writer, gguf_name, tensor, kind)
    if (factors := _rope_factors(model.config)) is not None:
        _add_tensor(writer, "rope_freqs.weight", factors, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: GgufType) -> None:
    quantization = _TYPES[kind][0] if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
    half = gguf.GGMLQuantizationType.F16
    if quantization is gguf.GGMLQuantizationType.Q8_0 and (
        name in ("token_embd.weight", "position_embd.weight")
        or tensor.shape[-1] % gguf.GGML_QUANT_SIZES[quantization][0]
    ):
        quantization = half
    if quantization is half and not bool(tensor.half().isfinite().all()):
        raise ValueError(f"the weight {name} has values that float16 cannot hold; give --gguf-type bf16")
    array = gguf.quants.quantize(tensor.contiguous().numpy(), quantization)
    writer.add_tensor(name, array, raw_dtype=quantization)


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rotary halves as neighboring pairs, which is how llama.cpp's `llama` rotates."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _rope_factors(config: Any) -> Tensor | None:
    """Llama 3's divisors of the rotary frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    wavelengths = 2 * math.pi / frequencies
    context, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    smooth = (context / wavelengths - low) / (high - low)
    factors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = torch.where(wavelengths < context / high, torch.ones_like(factors), factors)
    return torch.where(wavelengths > context / low, torch.full_like(factors, rope["factor"]), factors)


def _add_config(writer: gguf.GGUFWriter, config: Any, vocabulary: int) -> None:
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(dim)
    writer.add_key_length(dim)
    writer.add_value_length(dim)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: int) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens, types = [f"[PAD{index}]" for index in range(vocabulary)], [int(gguf.TokenType.UNUSED)] * vocabulary
    added = tokenizer.added_tokens_decoder
    for token, index in tokenizer.get_vocab().items():
        kind = gguf.TokenType.NORMAL
        if index in added:
            kind = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        tokens[index], types[index] = token, int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(pre_tokenizer_name(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_add_bos_token(False)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
