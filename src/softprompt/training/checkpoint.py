"""Everything that a training needs to go on, in one folder a step: `checkpoints/step-000500/`."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import final

import torch

from softprompt import files

_FOLDER = "checkpoints"
_REMEDY = "remove its folder to go on from the checkpoint before"
_PARTS = ("prompt", "best", "optimizer", "random")


@final
@dataclass(frozen=True)
class TrainerState:
    """Where a training is, beside its tensors."""

    best: float = -math.inf
    """The best development score so far."""
    best_step: int = 0
    """The step that it is of."""
    evals_without_improvement: int = 0
    """Evaluations since then, for early stopping."""
    seconds: float = 0.0
    """Seconds spent on steps and evaluations."""


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
    trainer_state: "TrainerState"


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return run / _FOLDER / f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's folder, whole or not at all."""
    with files.atomic_write(folder_of(run, checkpoint.step)) as draft:
        draft.mkdir()
        for part in _PARTS:
            files.write_tensors(draft / f"{part}.safetensors", getattr(checkpoint, part))
        (draft / "trainer_state.json").write_text(
            json.dumps({"step": checkpoint.step, **asdict(checkpoint.trainer_state)})
        )


def steps(run: Path) -> list[int]:
    """Steps at which there is a checkpoint, rising."""
    return sorted(int(path.name[5:]) for path in (run / _FOLDER).glob("step-*") if path.name[5:].isdigit())


def load(run: Path, step: int) -> Checkpoint:
    """The checkpoint of `step`.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file, by name.
    """
    folder = folder_of(run, step)
    parts = {part: files.read_tensors(folder / f"{part}.safetensors") for part in _PARTS}
    values = files.read_json(folder / "trainer_state.json")
    if values.pop("step", None) != step:
        raise ValueError(f"{folder / 'trainer_state.json'} is not of step {step}; it was swapped or damaged, {_REMEDY}")
    if values.keys() != {field.name for field in fields(TrainerState)}:
        raise ValueError(f"{folder / 'trainer_state.json'} holds {sorted(values)}; it is damaged, train again")
    return Checkpoint(step=step, trainer_state=TrainerState(**values), **parts)


def latest(run: Path) -> Checkpoint | None:
    """The last one, if there is any; raises as `load` does."""
    return load(run, done[-1]) if (done := steps(run)) else None


def pack(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors: `0.exp_avg` is of its first parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items()}


def unpack(tensors: dict[str, torch.Tensor], optimizer: torch.optim.AdamW, source: Path) -> None:
    """Put back what `pack` took out.

    Raises:
        ValueError: it is not the state of these parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    shapes: dict[str, torch.Size] = {}
    for number, parameter in enumerate(parameters):
        mine = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{number}.")}
        if mine:
            state[number] = mine
            shapes |= {f"{number}.{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
            shapes[f"{number}.step"] = torch.Size()
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise ValueError(
            f"{source} does not hold the optimiser's state of its own run; it was swapped or damaged, {_REMEDY}"
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Where torch's global generators are."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def of_each(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The random states of several processes: `cpu` is the first one's, `cpu.1` the second's."""
    return {_of(name, index): state for index, own in enumerate(states) for name, state in own.items()}


def restore_random(states: dict[str, torch.Tensor], device: torch.device, source: Path, process: int = 0) -> None:
    """Set torch's global generators in process number `process`; one that was not there before keeps its own.

    Raises:
        ValueError: these are no states of them.
    """
    cpu, cuda = _of("cpu", process), _of("cuda", process)
    if process and cpu not in states:
        return
    try:
        torch.set_rng_state(states[cpu])
        if cuda in states and device.type == "cuda":
            torch.cuda.set_rng_state(states[cuda], device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{source} holds no random states; it was swapped or damaged, {_REMEDY}") from error


def _of(name: str, process: int) -> str:
    return f"{name}.{process}" if process else name
