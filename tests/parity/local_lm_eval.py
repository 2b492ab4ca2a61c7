"""A task of lm-evaluation-harness over a local file, since its own tasks load their rows from the Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TASK = """
task: local_tickets
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Ticket: {{{{text}}}}\\nQueue:"
doc_to_target: answer
doc_to_choice: {words}
metric_list: [{{metric: acc}}]
"""


def write_local_task(folder: Path, label_words: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """The folder with the task `local_tickets`, whose rows have a `text` and an `answer`, the index of a label word."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = _TASK.format(rows=folder / "rows.jsonl", words=json.dumps(list(label_words)))
    (folder / "local.yaml").write_text(task)
    return folder
