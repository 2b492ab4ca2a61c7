"""The PEFT files in a finished run's folder."""

from pathlib import Path

from softprompt.export.peft import export_peft, peft_refusal
from softprompt.models import PromptedModel
from softprompt.models.baselines import export_lora
from softprompt.types import unusual_layout


def export_model(finished: PromptedModel, folder: Path) -> str:
    """Write the pair of files that stock PEFT loads; returns why not, if its format cannot express what was trained."""
    backbone = finished.backbone
    if finished.tuned is not None:
        if not hasattr(backbone.model, "peft_config"):
            return "every weight of the model was trained; they are in tuned.safetensors"
        export_lora(backbone, finished.peft_task_type, folder)
        return ""
    if finished.prompt is None:
        return "only a head was trained; it is in head.safetensors"
    if layout := unusual_layout(finished.prompt_position, finished.prompt_attention):
        return f"the prompt is {layout}, but PEFT puts every prompt in front of it"
    folded = finished.prompt.fold()
    refusal = peft_refusal(folded, backbone)
    if not refusal:
        export_peft(folded, backbone, folder)
    return refusal
