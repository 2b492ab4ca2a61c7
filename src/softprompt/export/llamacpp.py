"""Vectors for llama.cpp's C interface: `llama_batch.embd`, `n_tokens * n_embd` floats, read by your own program.

Differs: llama-server takes no embeddings; for it, export to `gguf`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, ExportedPrompt, Format, check_equal, text_notes, vectors_refusal

HEADER = "prompts.json"


@final
class LlamaCpp(Format):
    """`NAME.f32` for each prompt, raw little-endian float32, token by token; `prompts.json` has the sizes."""

    name: ClassVar[str] = "llamacpp"
    multi_prompt: ClassVar[bool] = True

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """Vectors before a decoder's text, in the units of its table."""
        return vectors_refusal(trained, backbone, "llama.cpp")

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """The vectors, and the header."""
        prompts = {}
        for item in trained:
            vectors = item.folded.prompt().detach().float().cpu().numpy()
            (folder / f"{item.name}.f32").write_bytes(vectors.astype("<f4").tobytes())
            prompts[item.name] = {"file": f"{item.name}.f32", "n_tokens": len(vectors)}
        header = {**text_notes(backbone), "n_embd": backbone.dim, "type": "float32, little-endian, row by row"}
        files.write_text(folder / HEADER, json.dumps({**header, "prompts": prompts}, indent=1))

    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Every row by the header's sizes, equal bit for bit."""
        header = files.read_json(folder / HEADER)
        for item in trained:
            entry = header["prompts"][item.name]
            values = np.fromfile(folder / entry["file"], dtype="<f4").astype(np.float32)
            vectors = torch.from_numpy(values.reshape(entry["n_tokens"], header["n_embd"]))
            check_equal(vectors, item.folded.prompt().detach().float(), f"{entry['file']}")
        return {"prompts": {item.name: len(item.folded.matrix) for item in trained}, **EXACT}
