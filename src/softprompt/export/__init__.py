"""Trained prompts for other software, and other software's prompts for softprompt.

A format is one file with a `Format` that refuses what it cannot express, writes, and reads back what it wrote; and one
entry in `FORMATS`.
"""

from softprompt.export.base import ExportedPrompt, Format, export_runs
from softprompt.export.dept import Dept, PublishedDePT, read_dept, write_dept
from softprompt.export.gguf import Gguf
from softprompt.export.llamacpp import LlamaCpp
from softprompt.export.model import export_model
from softprompt.export.npz import Npz
from softprompt.export.peft import Peft, export_peft, peft_refusal
from softprompt.export.trtllm import TrtLlm
from softprompt.export.vllm import Vllm
from softprompt.export.vocab import Vocab

FORMATS: dict[str, Format] = {
    export_format.name: export_format
    for export_format in (Peft(), Dept(), Vocab(), Gguf(), Vllm(), TrtLlm(), LlamaCpp(), Npz())
}
"""Every format by its value of `--to`."""

__all__ = [
    "FORMATS",
    "ExportedPrompt",
    "Format",
    "PublishedDePT",
    "export_model",
    "export_peft",
    "export_runs",
    "peft_refusal",
    "read_dept",
    "write_dept",
]
