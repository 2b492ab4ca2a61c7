"""BoolQ: a yes/no question about a passage, with the official training and validation rows of SuperGLUE."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt import assets
from softprompt.tasks.builtin.superglue import BOOLQ_ROWS
from softprompt.tasks.task import Task, Template, register

# The asset has the official splits shuffled into one file, and `idx` starts at 0 in each: an idx from 3,270 on is a
# training row, and each one below has two labeled rows. Bit idx (from the lowest of the first byte) says whether the
# first of the two is the validation row. Derived by comparing the texts with SuperGLUE's own files; valid only for
# this file, which `assets` checks by its sha256.
_EARLIER_IS_VALIDATION = base64.b64decode(
    "9+13Y3sKs1IJ4f9c6V1TZpMuZohOvUFB3i5R16Mz1OCVqgg9uMaQquDHDKVAvLNYa3uSFo87xZ1zJN4nbpUOLB+wwSRN72+IhKCy"
    "EG20wqKGKIH/DzyRxNmWlr52dQrvgcbhk6rgBh/qoP6ZZ/iDhLVSgm/fBRkRE7Vpngtu8Tesek7NMj4Zps9OaTsS4flfBeqtJ7F0"
    "ccnxRn/y5kfQGe1Z5fZTCkwmKxlw8oShhez6/cpzsyRaqGmebiSOVEL0Zt+udbqNp5R7VKAQ9ZWRjSeRRGzjXjwwMHo/jlNmksOX"
    "Syu/O6oOhp6+xTFUEI97X0PFLA+h8euDrD8vz6fiHQ2aAozgKKj0gZympaM5eq6EqaJ3IiTXwgULFktH0DVH1ohc0+M6jHzf6hO7"
    "8F/K38wMZ6GCKAq/rOmsltJOIlcTxYUDA0DOzS+wFwonOi6mM2qg/fFWDgmiwD2b8wu174Vptdp7z6pIittRM4qziGrPF+bscWcv"
    "448Bfd+yVU88o/boP87f4ZX2tj01Aub3VXFWBvIX4AGxDA=="
)
_VALIDATION = 3270


def _read(task: Task, folder: Path | None) -> Mapping[str, Any]:
    """Read the official splits from SuperGLUE's folder or the asset, without the test rows, which have no labels."""
    if folder is not None:
        return BOOLQ_ROWS(task, folder)
    from softprompt.tasks.data.tabular import read_rows  # not earlier: listing tasks needs no datasets

    rows = read_rows(assets.fetch("boolq"))
    seen_ids: set[int] = set()
    train: list[int] = []
    validation: list[int] = []
    for index, (idx, label) in enumerate(zip(rows["idx"][:], rows["label"][:], strict=True)):
        if label is None:
            continue
        earlier_is_validation = idx < _VALIDATION and bool(_EARLIER_IS_VALIDATION[idx // 8] >> idx % 8 & 1)
        is_validation = idx < _VALIDATION and earlier_is_validation != (idx in seen_ids)
        (validation if is_validation else train).append(index)
        seen_ids.add(idx)
    if len(validation) != _VALIDATION:
        raise ValueError(f"the asset boolq has {len(validation)} validation rows, not {_VALIDATION}; fetch it again")
    return {"train": rows.select(train), "validation": rows.select(validation)}


BOOLQ = register(
    Task(
        name="boolq",
        description="Does a passage answer a question with yes or no? SuperGLUE's validation is halved, by passage.",
        template="{passage}\nQuestion: {question}?\nAnswer:",
        label="label",
        label_words={"false": "no", "true": "yes"},
        metrics=("accuracy", "macro_f1"),
        group="passage",
        max_input_tokens=256,
        templates={
            "dpt": Template(text="question: {question} passage: {passage}", label_words={"false": "0", "true": "1"}),
            "residual": Template(
                text="passage: {passage} question: {question}", label_words={"false": "false", "true": "true"}
            ),
            "natural": Template(text="{passage}\nQuestion: {question}?\nAnswer:"),
            "lm-eval": Template(text="{passage}\nQuestion: {question}?\nAnswer:"),
        },
        source="boolq",
    ),
    _read,
)
"""9,427 training and 3,270 validation rows. 720 passages are in both, as in SuperGLUE; dev and test share none."""
