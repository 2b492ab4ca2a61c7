"""A stock PEFT prompt-tuning folder: `adapter_config.json` and `adapter_model.safetensors`.

Written with JSON and safetensors alone. The keys are the fourteen that every PEFT since 2023 reads; ours would go into
a file of our own, never in here, since older PEFT refuses a key it does not know.
"""

import json
from pathlib import Path

from safetensors.torch import save_file

from softprompt import files
from softprompt.backbone import Architecture, Backbone
from softprompt.prompts import Folded

_TASK_TYPES: dict[Architecture, str] = {
    "causal": "CAUSAL_LM",
    "encoder_decoder": "SEQ_2_SEQ_LM",
}


def peft_refusal(folded: Folded, architecture: Architecture) -> str:
    """Why PEFT's format cannot say this prompt; empty when it can."""
    if not folded.plain:
        return (
            "PEFT's prompt-tuning format holds vectors in front of the input alone, and this method also changes the "
            "input's own embeddings; use softprompt itself (predict, serve), or train dpt or residual, which fold to a "
            "plain prompt"
        )
    if architecture == "encoder":
        return "PEFT puts an encoder's prompt before [CLS] and ours stands behind it; use softprompt itself"
    if architecture not in _TASK_TYPES:
        return f"PEFT has no prompt-tuning format for {architecture} models; use softprompt itself"
    return ""


def export_peft(folded: Folded, backbone: Backbone, folder: Path) -> None:
    """Write `folded` into `folder`, so that `PeftModel.from_pretrained(model, folder)` gives the same outputs.

    Raises:
        ValueError: PEFT's format cannot say this prompt; nothing is written.
    """
    if reason := peft_refusal(folded, backbone.architecture):
        raise ValueError(reason)
    matrix = folded.prompt().detach().float().cpu().contiguous()
    config = backbone.model.config.get_text_config()
    values = {
        "auto_mapping": None,
        "base_model_name_or_path": backbone.base,
        "inference_mode": True,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "num_transformer_submodules": 1,  # PEFT's default of 2 for encoder-decoders allocates a half that nothing reads
        "num_virtual_tokens": matrix.shape[0],
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": _TASK_TYPES[backbone.architecture],
        "token_dim": matrix.shape[1],
        "tokenizer_name_or_path": None,
    }
    with files.replacing(folder / "adapter_model.safetensors") as draft:
        save_file({"prompt_embeddings": matrix}, draft, metadata={"format": "pt"})
    files.write_text(folder / "adapter_config.json", json.dumps(values, indent=2))
