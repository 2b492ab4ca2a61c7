"""Convert a GGUF file (llama.cpp) into a folder that transformers loads quickly."""

import hashlib
from pathlib import Path

import torch
import transformers

from softprompt import assets, files
from softprompt.backbones import loading


def convert(file: Path, digest: str | None = None) -> Path:
    """The float32 transformers folder of a `.gguf` file, made once and kept in the cache folder.

    Args:
        digest: the file's sha256, if it is known.
    """
    digest = digest or _sha256(file)
    folder = assets.cache_folder() / "backbones" / f"{file.stem}-{digest[:12]}"
    if not folder.is_dir():
        model = loading.load_model(
            transformers.AutoModelForCausalLM,
            str(file.parent),
            str(file),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        vocab_size = int(model.get_input_embeddings().weight.shape[0])
        tokenizer = loading.load_tokenizer(str(file.parent), str(file), model.config, vocab_size, gguf_file=file.name)
        try:
            with files.atomic_write(folder) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process wrote the same folder first
                raise
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
