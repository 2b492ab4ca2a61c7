"""What a row contains, for fingerprints and comparisons: equal rows have equal contents, wherever their files are."""

import json
from collections.abc import Mapping
from typing import Any

from softprompt.backbones import image_processor
from softprompt.tasks.task import Task


def contents(task: Task, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the digest of its image in the image's place: its content counts, not its path."""
    return {**row, task.image: image_processor.digest(row[task.image])} if task.image else row


def as_json(values: Mapping[str, Any]) -> bytes:
    """Plain values as text, equal for equal values."""
    return json.dumps(values, sort_keys=True, default=str).encode()
