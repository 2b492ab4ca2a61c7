"""Prompts as tokens: a full checkpoint whose vocabulary has them, for any engine that takes token ids."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.evaluation.predict import pad_id
from softprompt.export import client
from softprompt.export.base import ExportedPrompt, Format, check_close, check_gap, embedding_scale
from softprompt.export.extended_vocabulary import extend, vocabulary_refusal
from softprompt.export.probe import Probe, probe
from softprompt.models import model_class
from softprompt.models.padding import pad_batch

USAGE = "prompts.json"


@final
class Vocab(Format):
    """A checkpoint that transformers loads, with one token per vector of each prompt, and `prompts.json`.

    A row is `[prompt's ids; text's ids]`, the text tokenized as in the run: the tokenizer's leading special tokens (a
    beginning of sequence) come after the prompt, and a decoder's text has no closing tokens. `prompts.json` has the
    ids, and the same as text wherever the text gives these ids. `generation_config.json` suppresses the new tokens, so
    transformers never generates one. For engines that do not read it, `prompts.json` has the ids for a request's
    `logit_bias`, and the most probability that they had in the check without suppression.

    Costs a checkpoint of the backbone's size, and an untied head.
    """

    name: ClassVar[str] = "vocab"
    multi_prompt: ClassVar[bool] = True
    has_token_names: ClassVar[bool] = True

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """A plain prompt before a decoder's or an encoder-decoder's text."""
        if not model_class(backbone).generates:
            return (
                f"{backbone.source} is a model of the kind {backbone.architecture}, which does not answer with text; "
                "export to npz, or serve it with softprompt serve"
            )
        return vocabulary_refusal(trained, backbone)

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """Checkpoint, tokenizer, `prompts.json`, and for decoders `client.py`."""
        extended = extend(trained, backbone)
        extended.model.save_pretrained(folder)
        _suppress(folder / "generation_config.json", extended.usage["suppressed_ids"])
        extended.tokenizer.save_pretrained(folder)
        files.write_text(folder / USAGE, json.dumps({"format": self.name, **extended.usage}, indent=1))
        if model_class(backbone).decoder_only:
            shutil.copyfile(client.__file__, folder / "client.py")

    @torch.no_grad()
    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The checkpoint in plain transformers against the live runs, on fixed texts with the prompts mixed."""
        usage = files.read_json(folder / USAGE)
        # By the model's own class, as the Auto classes would.
        model = type(backbone.model).from_pretrained(folder, dtype=backbone.dtype, trust_remote_code=False)
        model = model.to(backbone.device).eval()
        prompt_ids = [usage["prompts"][item.name]["ids"] for item in trained]
        suppressed = torch.tensor(usage["suppressed_ids"])
        embedding = model.get_input_embeddings()
        for item, ids in zip(trained, prompt_ids, strict=True):
            expected = item.folded.prompt().detach().to(embedding.weight)
            rounding = 0.0 if embedding_scale(backbone) == 1.0 else torch.finfo(expected.dtype).eps * 4
            vectors = embedding(torch.tensor(ids, device=embedding.weight.device))
            check_close(vectors, expected, rounding, f"the embedding of {item.name}")
        gap = size = mass = 0.0
        for batch in probe(trained, backbone):
            logits, scores = _first_token(model, batch, prompt_ids, backbone)
            old = batch.logp.shape[1]
            logp = logits[:, :old].log_softmax(-1)
            gap = max(gap, float((logp - batch.logp).abs().max()))
            size = max(size, float(batch.logp.abs().max()))
            mass = max(mass, float(logits.softmax(-1)[:, suppressed].sum(-1).max()))
            if bool((scores[:, suppressed] > -torch.inf).any()):
                raise ValueError(
                    "transformers could generate a prompt's token, so the export is dropped; please report the backbone"
                )
        compared = check_gap(gap, size, backbone, "the checkpoint", "nat of log-probability")
        files.write_text(folder / USAGE, json.dumps({**usage, "unsuppressed_probability": mass}, indent=1))
        return {
            "prompts": {item.name: len(ids) for item, ids in zip(trained, prompt_ids, strict=True)},
            "as_text": usage["as_text"] is not None,
            **compared,
            "unsuppressed_probability": mass,
        }


def _suppress(file: Path, ids: Sequence[int]) -> None:
    """Edit the file itself: transformers refuses to save some published configurations unless they are unchanged."""
    values = files.read_json(file)
    values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), *ids})
    files.write_text(file, json.dumps(values, indent=2))


def _first_token(
    model: Any, batch: Probe, prompts: Sequence[Sequence[int]], backbone: Backbone
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the first token that `generate` would choose, before and after its processors."""
    rows = [[*prompts[prompt], *ids] for prompt, ids in zip(batch.prompt_index.tolist(), batch.ids, strict=True)]
    ids, mask = pad_batch(rows, model.device, model_class(backbone).padding_side, pad_id(backbone))
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    return output.logits[0].float().cpu(), output.scores[0].float().cpu()
