"""Rows for vLLM's `prompt_embeds`, which takes the whole input as one tensor: so the embedding table goes along."""

import base64
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export import vllm_client
from softprompt.export.base import Format, Trained, refuse_gap, row_refusal, same
from softprompt.export.probe import TEXTS, text_ids
from softprompt.models import attach


@final
class Vllm(Format):
    """`prompts.safetensors`, `embedding.safetensors`, `tokenizer/`, and `client.py`, which makes a request's tensor.

    Nothing in the folder can run when it is read, but for `client.py`, which is this package's own. A request's tensor
    is `torch.save`d because vLLM wants it so; it is made by the client, and never kept.
    """

    name: ClassVar[str] = "vllm"
    many: ClassVar[bool] = True

    def refusal(self, trained: Trained, backbone: Backbone) -> str:
        """Rows in front of a decoder, in the units of its table."""
        return row_refusal(trained, backbone, "vLLM")

    def write(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> None:
        """Prompts in float32, the table in the backbone's own type."""
        prompts = {one.name: one.folded.prompt().detach().float() for one in trained}
        files.write_tensors(folder / "prompts.safetensors", prompts)
        table = backbone.model.get_input_embeddings().weight.detach()
        files.write_tensors(folder / "embedding.safetensors", {"embedding": table.clone()})
        backbone.tokenizer.save_pretrained(folder / "tokenizer")
        shutil.copyfile(vllm_client.__file__, folder / "client.py")

    @torch.no_grad()
    def check(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The tensor that the client would send, against the live rows, and its logits against the live run's."""
        client, live = vllm_client.Prompts(folder), attach(backbone)
        own = backbone.model.get_input_embeddings()
        gap = size = 0.0
        for one in trained:
            for text, ids in zip(TEXTS, text_ids(backbone, TEXTS, closing=False), strict=True):
                sent = io.BytesIO(base64.b64decode(client.encoded(one.name, text)))
                rows = torch.load(sent, weights_only=True).to(backbone.device)
                row = torch.tensor([ids], device=backbone.device)
                wanted = torch.cat([one.folded.prompt().to(backbone.device, backbone.dtype), own(row)[0]])
                same(rows.cpu(), wanted.detach(), f"the request of {one.name}")
                theirs = backbone.model(inputs_embeds=rows[None]).logits[0, -1].float()
                ours = live(row, prompts=[one.folded]).logits[0, -1].float()
                gap, size = max(gap, float((theirs - ours).abs().max())), max(size, float(ours.abs().max()))
        compared = refuse_gap(gap, size, backbone, "the request's tensor", "logit")
        return {"prompts": {one.name: len(one.folded.matrix) for one in trained}, **compared}
