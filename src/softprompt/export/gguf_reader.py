"""The metadata of a GGUF file, read back and compared with the config that it was written from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from softprompt.export.gguf_writer import ARCHITECTURES


def check_metadata(file: Path, config: Any, tokenizer: Any) -> None:
    """Check that a file says of its model what `config` and `tokenizer` do: all that llama.cpp computes it from.

    Args:
        file: as `write_gguf` wrote it.
        config: the config of the model in the file, with its number of tokens.
        tokenizer: the tokenizer in the file.

    Raises:
        ValueError: a key is missing, has another value, or is one that the config says nothing about.
    """
    architecture = ARCHITECTURES[config.model_type]
    expected = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in _model_metadata(config).items()},
        **_tokenizer_metadata(tokenizer),
    }
    fields = gguf.GGUFReader(file).fields
    actual = {
        name: field.contents()
        for name, field in fields.items()
        if name in expected or name.startswith(f"{architecture}.") or name.endswith("_token_id")
    }
    for name in sorted(expected.keys() | actual.keys()):
        if not _equal(actual.get(name), expected.get(name)):
            raise ValueError(
                f"the GGUF file has {name} = {actual.get(name)} and the model {expected.get(name)}, so the export is "
                "dropped; please report the backbone"
            )


def _equal(actual: Any, expected: Any) -> bool:
    """Whether two values are equal; numbers that are not integers are stored as float32."""
    return bool(actual == (float(np.float32(expected)) if isinstance(expected, float) else expected))


def _model_metadata(config: Any) -> Mapping[str, int | float]:
    """The keys of llama.cpp's architecture with the config's values."""
    shared = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        inner = config.n_inner or 4 * config.hidden_size
        return {
            **shared,
            "feed_forward_length": inner,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        **shared,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def _tokenizer_metadata(tokenizer: Any) -> Mapping[str, int | bool]:
    """The ids of special tokens, of those that the tokenizer has, and that none is added before a prompt."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    known = {f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items() if index is not None}
    return {**known, "tokenizer.ggml.add_bos_token": False}
