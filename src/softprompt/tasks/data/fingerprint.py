"""The fingerprint of rows: equal rows have equal fingerprints, wherever their files are."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from softprompt.backbones import image_processor
from softprompt.tasks.data.tabular import records
from softprompt.tasks.task import Task


def fingerprint(task: Task, parts: Mapping[str, Dataset]) -> str:
    """sha256 of every column that the task reads, part by part and row by row."""
    digest = hashlib.sha256()
    for name, rows in parts.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in records(rows.select_columns(list(task.columns))):
            digest.update(as_json(contents(task, row)) + b"\n")
    return digest.hexdigest()


def contents(task: Task, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the digest of its image in the image's place: its content counts, not its path."""
    return {**row, task.image: image_processor.digest(row[task.image])} if task.image else row


def as_json(row: Mapping[str, Any]) -> bytes:
    """The row as text, equal for equal rows."""
    return json.dumps(row, sort_keys=True, default=str).encode()
