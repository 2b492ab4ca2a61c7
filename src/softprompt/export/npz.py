"""A numpy archive of the folded tensors, of every method: what any language with a zip reader can load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from softprompt.backbones import Backbone
from softprompt.export.base import EXACT, Format, Trained, same

FILE = "prompts.npz"


@final
class Npz(Format):
    """`prompts.npz`: float32 arrays `NAME.matrix`, and `NAME.position_table`, `NAME.input_table` where there are any.

    A row is laid out `[matrix; E + position_table[place in the text] + input_table[id]]`; `NAME.beyond` says what a
    token past the position table gets: `refuse` (the run would refuse the row) or `none`. `NAME.depth` is 1, or of a
    deep prompt the number of layers whose vectors lie one behind another in `NAME.matrix`.
    """

    name: ClassVar[str] = "npz"
    many: ClassVar[bool] = True

    def refusal(self, trained: Trained, backbone: Backbone) -> str:
        """Nothing is refused."""
        return ""

    def write(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> None:
        """One archive."""
        arrays: dict[str, Any] = {}
        for one in trained:
            arrays |= {f"{one.name}.{key}": tensor.float().numpy() for key, tensor in _tensors(one).items()}
            arrays[f"{one.name}.beyond"] = np.array(one.folded.beyond)
            arrays[f"{one.name}.depth"] = np.array(one.folded.depth)
        np.savez(folder / FILE, **arrays)

    def check(self, trained: Sequence[Trained], backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Every array, read without unpickling, equal bit for bit."""
        found = 0
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            for one in trained:
                for key, tensor in _tensors(one).items():
                    same(torch.from_numpy(arrays[f"{one.name}.{key}"]), tensor.float(), f"{one.name}.{key}")
                    found += 1
        return {"prompts": {one.name: len(one.folded.matrix) for one in trained}, "arrays": found, **EXACT}


def _tensors(trained: Trained) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in trained.folded.state_dict().items()}
