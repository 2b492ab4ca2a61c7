"""A numpy archive of the folded tensors of any method, for any language with a zip reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, ExportedPrompt, Format, check_equal

FILE = "prompts.npz"


@final
class Npz(Format):
    """`prompts.npz`: float32 arrays `NAME.matrix`, and `NAME.position_table`, `NAME.input_table` where there are any.

    A row is `[matrix; E(text) + position_table[position in the text] + input_table[id]]`; `NAME.beyond` says what a
    token past the position table gets: `refuse` (the run would refuse the row) or `none`. `NAME.num_matrices` is
    how many `NAME.matrix` concatenates: 1, or for a deep prompt one per layer, in a decoder two (keys and values).
    """

    name: ClassVar[str] = "npz"
    multi_prompt: ClassVar[bool] = True

    def refusal(self, trained: ExportedPrompt, backbone: Backbone) -> str:
        """Every prompt can be expressed."""
        return ""

    def write(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> None:
        """One archive."""
        arrays: dict[str, Any] = {}
        for item in trained:
            arrays |= {f"{item.name}.{key}": tensor.float().numpy() for key, tensor in _tensors(item).items()}
            arrays[f"{item.name}.beyond"] = np.array(item.folded.beyond)
            arrays[f"{item.name}.num_matrices"] = np.array(item.folded.num_matrices)
        np.savez(folder / FILE, **arrays)

    def check(self, trained: Sequence[ExportedPrompt], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Every array, read without unpickling, equal bit for bit."""
        count = 0
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            for item in trained:
                for key, tensor in _tensors(item).items():
                    check_equal(torch.from_numpy(arrays[f"{item.name}.{key}"]), tensor.float(), f"{item.name}.{key}")
                    count += 1
        return {"prompts": {item.name: len(item.folded.matrix) for item in trained}, "arrays": count, **EXACT}


def _tensors(trained: ExportedPrompt) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in trained.folded.state_dict().items()}
