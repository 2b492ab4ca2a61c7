"""Prompts as tokens of a llama.cpp model: one GGUF file for llama-server, and Modelfiles for Ollama."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
import transformers

from softprompt import files
from softprompt.backbones import Backbone, loading
from softprompt.evaluation.predict import pad_id
from softprompt.export import client
from softprompt.export.base import ExportedPrompt, Format, check_close
from softprompt.export.extended_vocabulary import extend, vocabulary_refusal
from softprompt.export.gguf_reader import check_metadata
from softprompt.export.gguf_writer import GgufType, gguf_refusal, write_gguf
from softprompt.export.probe import probe
from softprompt.models import model_class
from softprompt.models.padding import pad_batch

_ROUNDING: dict[GgufType, float] = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-11}
"""Largest relative error of a prompt's values, which `q8_0` stores as float16."""
_TOLERANCES: dict[GgufType, float] = {"f32": 1e-3, "f16": 2e-2, "bf16": 6e-2, "q8_0": 6e-2}
"""Largest difference of log-probabilities, relative to the largest one."""


@final
@dataclass(frozen=True)
class Gguf(Format):
    """`model.gguf`, `prompts.json`, `tokenizer/`, `client.py`, and one `NAME.Modelfile` per prompt for Ollama.

    A row is laid out as in the `vocab` format. The embedding table, and with it the prompts, is stored as the weights
    are, except that `q8_0` stores it as float16. llama.cpp knows no suppressed tokens; see `prompts.json` for what a
    request's `logit_bias` must suppress when it samples.
    """

    name: ClassVar[str] = "gguf"
    multi_prompt: ClassVar[bool] = True
    has_token_names: ClassVar[bool] = True
    type: GgufType = "f16"

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """A plain prompt before a decoder's text, of an architecture that `gguf_writer` knows."""
        if not model_class(backbone).decoder_only:
            return (
                f"llama.cpp takes a prompt before a decoder's text only, but {backbone.source} is a model of the kind "
                f"{backbone.architecture}; export to vocab or npz, or serve it with softprompt serve"
            )
        return vocabulary_refusal(trained, backbone) or gguf_refusal(backbone.model, backbone.tokenizer)

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """The model, its tokenizer and texts."""
        extended = extend(trained, backbone)
        write_gguf(extended.model, extended.tokenizer, folder / "model.gguf", Path(backbone.base).stem, self.type)
        extended.tokenizer.save_pretrained(folder / "tokenizer")
        shutil.copyfile(client.__file__, folder / "client.py")
        usage = {"format": self.name, "type": self.type, **extended.usage}
        files.write_text(folder / "prompts.json", json.dumps(usage, indent=1))
        for name, entry in usage["prompts"].items():
            if entry["text"] is not None:
                files.write_text(folder / f"{name}.Modelfile", _modelfile(entry["text"]))

    @torch.no_grad()
    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The file as transformers reads GGUF, against the live runs, on fixed texts with the prompts mixed."""
        usage = files.read_json(folder / "prompts.json")
        # transformers reads neither GPT-2's number of positions nor Llama 3's rotary factors from the file, so it gets
        # the run's own config, and the file's is compared.
        config = copy.deepcopy(backbone.model.config)
        config.vocab_size, config.tie_word_embeddings = max(usage["suppressed_ids"]) + 1, False
        check_metadata(folder / "model.gguf", config, backbone.tokenizer)
        model = loading.load_model(
            transformers.AutoModelForCausalLM,
            str(folder),
            str(folder / "model.gguf"),
            gguf_file="model.gguf",
            config=config,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        model = model.to(backbone.device).eval()
        prompts = [usage["prompts"][item.name]["ids"] for item in trained]
        for item, ids in zip(trained, prompts, strict=True):
            vectors = model.get_input_embeddings().weight[torch.tensor(ids, device=model.device)]
            expected = item.folded.prompt().detach().to(backbone.dtype).to(vectors)
            check_close(vectors, expected, _ROUNDING[self.type], f"the embedding of {item.name}")
        gap = size = 0.0
        for batch in probe(trained, backbone):
            rows = [
                [*prompts[prompt], *ids] for prompt, ids in zip(batch.prompt_index.tolist(), batch.ids, strict=True)
            ]
            ids, mask = pad_batch(rows, backbone.device, "left", pad_id(backbone))
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            logits = model(**inputs).logits[:, -1].float()
            logp = logits[:, : batch.logp.shape[1]].log_softmax(-1).cpu()
            gap = max(gap, float((logp - batch.logp).abs().max()))
            size = max(size, float(batch.logp.abs().max()))
        tolerance = max(_TOLERANCES[self.type], 1e-3 if backbone.dtype is torch.float32 else 6e-2) * max(size, 1.0)
        if not gap <= tolerance:
            raise ValueError(
                f"the GGUF file gives other scores than the live run (largest difference {gap:.2g}), so the export is "
                "dropped; give --gguf-type f16, or report the backbone"
            )
        return {
            "prompts": {item.name: len(ids) for item, ids in zip(trained, prompts, strict=True)},
            "as_text": usage["as_text"] is not None,
            "type": self.type,
            "largest_difference": gap,
            "unit": "nat of log-probability",
            "tolerance": tolerance,
        }

    def with_type(self, kind: GgufType) -> "Gguf":
        """The same format with weights of another type."""
        return dataclasses.replace(self, type=kind)


def _modelfile(prompt: str) -> str:
    return f'FROM ./model.gguf\nTEMPLATE """{prompt}{{{{ .Prompt }}}}"""\nPARAMETER temperature 0\n'
