"""Everything that a training needs to go on, in one folder a step: `checkpoints/step-000500/`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from softprompt import files

_FOLDER = "checkpoints"
_PARTS = ("prompt", "best", "optimizer", "random")


@final
@dataclass(frozen=True)
class Checkpoint:
    """Everything that a training needs to go on as if it had never stopped."""

    step: int
    """Steps done."""
    prompt: dict[str, torch.Tensor]
    """The method's tensors now."""
    best: dict[str, torch.Tensor]
    """The method's tensors at the best evaluation; empty before the first."""
    optimizer: dict[str, torch.Tensor]
    """Its state, by parameter and name."""
    random: dict[str, torch.Tensor]
    """States of the random generators."""
    place: dict[str, Any]
    """Plain values: the best score and its step, evaluations without a better one, seconds spent."""


def save(run: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's folder, whole or not at all."""
    with files.replacing(run / _FOLDER / f"step-{checkpoint.step:06d}") as draft:
        draft.mkdir()
        for part in _PARTS:
            files.write_tensors(draft / f"{part}.safetensors", getattr(checkpoint, part))
        (draft / "place.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.place}))


def steps(run: Path) -> list[int]:
    """Steps at which there is a checkpoint, rising."""
    return sorted(int(path.name[5:]) for path in (run / _FOLDER).glob("step-*"))


def load(run: Path, step: int) -> Checkpoint:
    """The checkpoint of `step`.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file, by name.
    """
    folder = run / _FOLDER / f"step-{step:06d}"
    parts = {part: files.read_tensors(folder / f"{part}.safetensors") for part in _PARTS}
    place = files.read_json(folder / "place.json")
    return Checkpoint(step=place.pop("step"), place=place, **parts)


def pack(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors: `0.exp_avg` is of its first parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items()}


def unpack(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put back what `pack` took out."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
