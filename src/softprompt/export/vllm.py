"""Embeddings for vLLM's `prompt_embeds`, which takes the whole input as one tensor, so the export has the table too."""

import base64
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export import client
from softprompt.export.base import ExportedPrompt, Format, check_equal, check_gap, text_notes, vectors_refusal
from softprompt.export.extended_vocabulary import task_entry
from softprompt.export.probe import TEXTS, text_ids
from softprompt.models import attach


@final
class Vllm(Format):
    """`prompts.safetensors`, `embedding.safetensors`, `prompts.json`, `tokenizer/`, and `client.py`.

    Only `client.py` is code, a copy of this package's. A request's tensor is made by the client with `torch.save`,
    which vLLM requires, and is never stored.
    """

    name: ClassVar[str] = "vllm"
    multi_prompt: ClassVar[bool] = True

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """Vectors before a decoder's text, in the units of its table."""
        return vectors_refusal(trained, backbone, "vLLM")

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """Prompts in float32, the table in the backbone's own dtype."""
        prompts = {item.name: item.folded.prompt().detach().float() for item in trained}
        files.write_tensors(folder / "prompts.safetensors", prompts)
        table = backbone.model.get_input_embeddings().weight.detach()
        files.write_tensors(folder / "embedding.safetensors", {"embedding": table.clone()})
        entries = {item.name: task_entry(item, backbone) for item in trained}
        usage = {"format": self.name, **text_notes(backbone), "prompts": entries}
        files.write_text(folder / "prompts.json", json.dumps(usage, indent=1))
        backbone.tokenizer.save_pretrained(folder / "tokenizer")
        shutil.copyfile(client.__file__, folder / "client.py")

    @torch.no_grad()
    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The tensor that the client would send against the live embeddings, and its logits against the live run's."""
        exported, live = client.VllmEmbeds(folder), attach(backbone)
        embedding = backbone.model.get_input_embeddings()
        gap = size = 0.0
        for item in trained:
            for text, ids in zip(TEXTS, text_ids(backbone, TEXTS, appends_eos=False), strict=True):
                request = io.BytesIO(base64.b64decode(exported.encoded(item.name, text)))
                embeds = torch.load(request, weights_only=True).to(backbone.device)
                row = torch.tensor([ids], device=backbone.device)
                prompt = item.folded.prompt().to(backbone.device, backbone.dtype)
                expected = torch.cat([prompt, embedding(row)[0]])
                check_equal(embeds.cpu(), expected.detach(), f"the request of {item.name}")
                logits = backbone.model(inputs_embeds=embeds[None]).logits[0, -1].float()
                live_logits = live(row, prompts=[item.folded]).logits[0, -1].float()
                gap = max(gap, float((logits - live_logits).abs().max()))
                size = max(size, float(live_logits.abs().max()))
        compared = check_gap(gap, size, backbone, "the request's tensor", "logit")
        return {"prompts": {item.name: len(item.folded.matrix) for item in trained}, **compared}
