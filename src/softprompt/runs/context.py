"""The text that a distilled prompt stands for, kept beside the run's record."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTEXT = "context.txt"
"""The file; only in the folder of a distillation."""


def fingerprint(context: str) -> str | None:
    """What the run's record says of the context: its sha256; None where nothing is distilled."""
    return hashlib.sha256(context.encode()).hexdigest() if context else None


def read_context_file(folder: Path, record: Mapping[str, Any]) -> str:
    """The text that a run distils; empty for a run that is no distillation.

    Raises:
        ValueError: the file is missing or has been changed.
    """
    if record.get("context") is None:
        return ""
    path = folder / CONTEXT
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if fingerprint(text) != record["context"]:
        raise ValueError(f"{path} is not the text that the run was started with; put it back, or start a new run")
    return text
