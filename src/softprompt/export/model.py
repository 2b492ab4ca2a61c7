"""What a finished run leaves for stock PEFT."""

from pathlib import Path

from softprompt.export.peft import export_peft, peft_refusal
from softprompt.models import PromptedModel
from softprompt.models.baselines import export_lora
from softprompt.types import unusual_layout


def export_model(finished: PromptedModel, folder: Path) -> str:
    """Write what stock PEFT loads, if its format can say what was trained; else the reason why it cannot."""
    backbone = finished.backbone
    if finished.tuned is not None:
        if not hasattr(backbone.model, "peft_config"):
            return "every weight of the model was trained; they are in tuned.safetensors"
        export_lora(backbone, folder)
        return ""
    if finished.prompt is None:
        return "a head alone was trained; it is in head.safetensors"
    if own := unusual_layout(finished.prompt_position, finished.prompt_attention):
        return f"the prompt is {own}, and PEFT puts every prompt in front of it"
    folded = finished.prompt.fold()
    refusal = peft_refusal(folded, backbone.architecture)
    if not refusal:
        export_peft(folded, backbone, folder)
    return refusal
