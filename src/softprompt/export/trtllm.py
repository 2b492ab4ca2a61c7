"""TensorRT-LLM's prompt table: one array `[task, token, hidden]`, and ids past the vocabulary that point into it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, ExportedPrompt, Format, check_equal, text_notes, vectors_refusal

TABLE, TASKS = "prompt_table.npy", "tasks.json"


@final
class TrtLlm(Format):
    """`prompt_table.npy` for `--prompt_table_path`, and `tasks.json`: each prompt's task id and virtual token ids.

    The engine indexes the table by `task * tokens + (id - vocab_size)` with the same number of tokens for all tasks, so
    shorter prompts are padded with zeros, which the ids in `tasks.json` never address. Float32 (float16 where the
    backbone is): numpy has no bfloat16, and the engine converts the table to its own dtype.
    """

    name: ClassVar[str] = "trtllm"
    multi_prompt: ClassVar[bool] = True

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """Vectors before a decoder's text, in the units of its table."""
        return vectors_refusal(trained, backbone, "TensorRT-LLM")

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """The table and its index."""
        prompts = [_vectors(item, backbone) for item in trained]
        table = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        np.save(folder / TABLE, table.numpy(), allow_pickle=False)
        first = len(backbone.model.get_input_embeddings().weight)
        tasks = {
            item.name: {"task": number, "tokens": len(vectors), "ids": list(range(first, first + len(vectors)))}
            for number, (item, vectors) in enumerate(zip(trained, prompts, strict=True))
        }
        size = int(table.shape[0] * table.shape[1])
        notes = {**text_notes(backbone), "vocab_size": first, "max_prompt_embedding_table_size": size, "tasks": tasks}
        files.write_text(folder / TASKS, json.dumps(notes, indent=1))

    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Each task's vectors, indexed as the engine does, equal bit for bit."""
        notes = files.read_json(folder / TASKS)
        table = torch.from_numpy(np.load(folder / TABLE, allow_pickle=False))
        flat = table.reshape(-1, table.shape[2])
        for item in trained:
            entry = notes["tasks"][item.name]
            positions = torch.tensor(entry["ids"]) - notes["vocab_size"] + entry["task"] * table.shape[1]
            check_equal(flat[positions], _vectors(item, backbone), f"task {entry['task']} of {TABLE}")
        return {
            "prompts": {item.name: len(item.folded.matrix) for item in trained},
            "table": list(table.shape),
            **EXACT,
        }


def _vectors(trained: ExportedPrompt, backbone: Backbone) -> torch.Tensor:
    dtype = torch.float16 if backbone.dtype is torch.float16 else torch.float32
    return trained.folded.prompt().detach().cpu().to(dtype)
