"""A llama.cpp file as a folder that transformers loads fast."""

import hashlib
from pathlib import Path

import torch
import transformers

from softprompt import assets, files
from softprompt.backbones import loading


def converted(file: Path, digest: str | None = None) -> Path:
    """The transformers folder of a `.gguf` file, made once and kept in the cache folder (float32).

    Args:
        digest: the file's sha256, where it is known.
    """
    digest = digest or _sha256(file)
    folder = assets.cache_folder() / "backbones" / f"{file.stem}-{digest[:12]}"
    if not folder.is_dir():
        unpacked = transformers.GgufConfig(dequantize=True)
        model = loading.pretrained(
            transformers.AutoModelForCausalLM,
            str(file.parent),
            str(file),
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=unpacked,
        )
        rows = int(model.get_input_embeddings().weight.shape[0])
        tokenizer = loading.tokenizer(str(file.parent), str(file), model.config, rows, gguf_file=file.name)
        try:
            with files.atomic_write(folder) as draft:
                model.save_pretrained(draft)
                tokenizer.save_pretrained(draft)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same bits
                raise
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
