"""Checkpoints: everything that an interrupted run needs to resume, in a folder such as `checkpoints/step-000500/`."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import final

import torch

from softprompt import files

_FOLDER = "checkpoints"
_ADVICE = "remove its folder to resume from the checkpoint before it"
_PARTS = ("prompt", "best", "optimizer", "random")


@final
@dataclass
class TrainerState:
    """The progress of a training run, apart from its tensors."""

    step: int = 0
    """Steps done."""
    best: float = -math.inf
    """The best development score so far."""
    best_step: int = 0
    """The step of the best score."""
    evals_without_improvement: int = 0
    """Evaluations since the best score, for early stopping."""
    seconds: float = 0.0
    """Seconds spent on steps and evaluations."""


@final
@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue as if it had never stopped."""

    trainer_state: TrainerState
    prompt: dict[str, torch.Tensor]
    """The current trainable tensors."""
    best: dict[str, torch.Tensor]
    """The trainable tensors at the best evaluation; empty before the first."""
    optimizer: dict[str, torch.Tensor]
    """The optimizer's state, as `pack_optimizer` returns it."""
    random: dict[str, torch.Tensor]
    """The random states of all processes, as `merge_random_states` returns them."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.trainer_state.step


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return run / _FOLDER / f"step-{step:06d}"


def save(run: Path, checkpoint: Checkpoint) -> None:
    """Write the checkpoint's folder atomically."""
    with files.atomic_write(folder_of(run, checkpoint.step)) as draft:
        draft.mkdir()
        for part in _PARTS:
            files.write_tensors(draft / f"{part}.safetensors", getattr(checkpoint, part))
        (draft / "trainer_state.json").write_text(json.dumps(asdict(checkpoint.trainer_state)))


def steps(run: Path) -> list[int]:
    """The steps of all checkpoints of the run, ascending."""
    return sorted(int(path.name[5:]) for path in (run / _FOLDER).glob("step-*") if path.name[5:].isdigit())


def load(run: Path, step: int) -> Checkpoint:
    """Read the checkpoint at `step`.

    Raises:
        FileNotFoundError, ValueError: a missing or damaged file, by name.
    """
    folder = folder_of(run, step)
    parts = {part: files.read_tensors(folder / f"{part}.safetensors", _ADVICE) for part in _PARTS}
    file = folder / "trainer_state.json"
    values = files.read_json(file, _ADVICE)
    if values.get("step") != step:
        raise ValueError(f"{file} is not of step {step}; it was swapped or damaged, {_ADVICE}")
    if values.keys() != {field.name for field in fields(TrainerState)}:
        raise ValueError(f"{file} holds {sorted(values)}; it is damaged, {_ADVICE}")
    if not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError(f"{file} holds {values}, which should be numbers; it is damaged, {_ADVICE}")
    if values["best_step"] and not parts["best"]:
        raise ValueError(f"{folder / 'best.safetensors'} is empty, but step {values['best_step']} was best; {_ADVICE}")
    return Checkpoint(trainer_state=TrainerState(**values), **parts)


def latest(run: Path) -> Checkpoint | None:
    """Read the last checkpoint, if there is one; raises like `load`."""
    return load(run, saved[-1]) if (saved := steps(run)) else None


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as named tensors: `0.exp_avg` belongs to its first parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items()}


def unpack_optimizer(tensors: dict[str, torch.Tensor], optimizer: torch.optim.AdamW, source: Path) -> None:
    """Load what `pack_optimizer` returned.

    Args:
        source: the file that the tensors are from, for an error message.

    Raises:
        ValueError: the tensors are not the state of these parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    shapes: dict[str, torch.Size] = {}
    for number, parameter in enumerate(parameters):
        entry = {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{number}.")}
        if entry:
            state[number] = entry
            shapes |= {f"{number}.{key}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
            shapes[f"{number}.step"] = torch.Size()
    if {name: value.shape for name, value in tensors.items()} != shapes:
        raise ValueError(
            f"{source} does not hold the optimizer's state of its own run; it was swapped or damaged, {_ADVICE}"
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's global random generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def merge_random_states(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The random states of all processes in one dictionary: `cpu` of the first process, `cpu.1` of the second."""
    return {_key(name, rank): state for rank, local in enumerate(states) for name, state in local.items()}


def restore_random(states: dict[str, torch.Tensor], device: torch.device, source: Path, rank: int = 0) -> None:
    """Set torch's global random generators in process `rank`; a process without a saved state keeps its own.

    Args:
        source: the file that the states are from, for an error message.

    Raises:
        ValueError: the tensors are not random states.
    """
    cpu, cuda = _key("cpu", rank), _key("cuda", rank)
    if rank and cpu not in states:
        return
    try:
        torch.set_rng_state(states[cpu])
        if cuda in states and device.type == "cuda":
            torch.cuda.set_rng_state(states[cuda], device)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{source} does not hold random states; it was swapped or damaged, {_ADVICE}") from error


def _key(name: str, rank: int) -> str:
    return f"{name}.{rank}" if rank else name
