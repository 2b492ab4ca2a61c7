"""A trained prompt for other software."""

from softprompt.export.peft import export_peft, peft_refusal

__all__ = ["export_peft", "peft_refusal"]
