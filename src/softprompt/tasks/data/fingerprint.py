"""The fingerprint of rows: equal rows have equal fingerprints, wherever their files are."""

import hashlib
import json
from collections.abc import Mapping

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
            # The content of an image's file counts, not its path.
            read = {**row, task.image: image_processor.digest(row[task.image])} if task.image else row
            digest.update(json.dumps(read, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
