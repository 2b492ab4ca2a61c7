"""A stock PEFT folder: `adapter_config.json` and `adapter_model.safetensors`.

Prompt tuning, and for the deep prompt of a decoder prefix tuning without a projection.

The config has only the fourteen keys that every PEFT since 2023 reads, because older versions refuse unknown keys.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, ExportedPrompt, Format, check_equal
from softprompt.models import model_class
from softprompt.models.peft_folder import CONFIG, PROMPT, WEIGHTS, read_peft_folder
from softprompt.prompts import Folded


def peft_refusal(folded: Folded, backbone: Backbone) -> str:
    """Why PEFT's format cannot express this prompt; empty where it can."""
    if not folded.plain:
        return (
            "PEFT's prompt-tuning format holds vectors in front of the input only, but this method also changes the "
            "input's own embeddings; use softprompt itself (predict, serve), or train dpt or residual, which fold to a "
            "plain prompt"
        )
    if model_class(backbone).peft_task_type is None:
        return (
            f"PEFT has no prompt-tuning format for {backbone.architecture} models, whose prompt follows [CLS]; use "
            "softprompt itself"
        )
    return ""


def export_peft(folded: Folded, backbone: Backbone, folder: str | Path) -> None:
    """Write `folded` into `folder`, so that `PeftModel.from_pretrained(model, folder)` gives the same outputs.

    An adapter that is already in the folder is overwritten; other files stay.

    Raises:
        ValueError: PEFT's format cannot express this prompt; nothing is written.
    """
    if reason := peft_refusal(folded, backbone):
        raise ValueError(reason)
    path, matrix = Path(folder).expanduser(), _peft_matrix(folded)
    config = backbone.model.config.get_text_config()
    values: dict[str, Any] = {
        "auto_mapping": None,
        "base_model_name_or_path": backbone.base,
        "inference_mode": True,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,  # PEFT's default of 2 for encoder-decoders allocates an unused half
        "num_virtual_tokens": matrix.shape[0],
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": model_class(backbone).peft_task_type,
        "token_dim": matrix.shape[1],
        "tokenizer_name_or_path": None,
    }
    if folded.is_deep:
        layout = backbone.kv_layout
        assert layout is not None  # `peft_refusal` let no other deep prompt pass
        values = {name: value for name, value in values.items() if not name.startswith(("prompt_", "tokenizer_"))}
        values |= {
            "encoder_hidden_size": layout.width,
            "num_attention_heads": layout.num_kv_heads,
            "num_layers": layout.num_layers,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "token_dim": layout.width,
        }
    files.write_tensors(path / WEIGHTS, {PROMPT: matrix})
    files.write_text(path / CONFIG, json.dumps(values, indent=2))


def _peft_matrix(folded: Folded) -> Float[Tensor, "length _"]:
    """The tensor `prompt_embeddings`: virtual tokens, or of a deep prompt each token's `[K_1, V_1, K_2, V_2, ...]`."""
    return torch.cat(folded.prompt().detach().float().cpu().chunk(folded.num_matrices), 1).contiguous()


@final
class Peft(Format):
    """The folder that `PeftModel.from_pretrained` loads; a finished run whose prompt folds is one already."""

    name: ClassVar[str] = "peft"
    multi_prompt: ClassVar[bool] = False

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """As of `peft_refusal`."""
        return peft_refusal(trained.folded, backbone)

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """The pair of files."""
        export_peft(trained[0].folded, backbone, folder)

    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """The prompt, equal bit for bit, and a config that states its sizes."""
        [item] = trained
        expected = item.folded.prompt().detach().float()
        check_equal(read_peft_folder(folder).prompt(backbone).prompt(), expected, "the PEFT prompt")
        return {"prompts": {item.name: len(expected) // item.folded.num_matrices}, **EXACT}
