"""A llama.cpp file as a folder that transformers loads fast."""

import hashlib
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from softprompt import assets, files


def converted(file: Path, digest: str | None = None) -> Path:
    """The transformers folder of a `.gguf` file, made once and kept in the cache folder (float32).

    Args:
        digest: the file's sha256, where it is known.
    """
    digest = digest or _sha256(file)
    folder = assets.cache_folder() / "backbones" / f"{file.stem}-{digest[:12]}"
    if not folder.is_dir():
        place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        unpacked = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **place, dtype=torch.float32, quantization_config=unpacked
        )
        tokenizer = AutoTokenizer.from_pretrained(**place)
        try:
            with files.replacing(folder) as draft:
                model.save_pretrained(draft)
                tokenizer.save_pretrained(draft)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was first, with the same bits
                raise
    return folder


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
