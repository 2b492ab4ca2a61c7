"""A trained prompt for other software, and other software's prompts for us."""

from softprompt.export.attachment import export_attachment
from softprompt.export.dept import PublishedDePT, read_dept, write_dept
from softprompt.export.peft import export_peft, peft_refusal

__all__ = ["PublishedDePT", "export_attachment", "export_peft", "peft_refusal", "read_dept", "write_dept"]
