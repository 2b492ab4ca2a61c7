"""The singular values of the loss's gradient, at random vocabulary rows of a backbone or along a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt import runs
from softprompt.analysis.rank.loaded_prompt import load_prompts
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.assets.hub import local_folder
from softprompt.backbones import load
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import read_splits, splits_of
from softprompt.prompts.plain import Plain
from softprompt.runs import Gradient
from softprompt.tasks.user import load_task
from softprompt.training.callbacks import NullCallback, TrainingCallback
from softprompt.training.context import teacher_of
from softprompt.training.gradients import gradient_on
from softprompt.training.setup import with_sample_images


@final
@dataclass(frozen=True, kw_only=True)
class GradientPoint:
    """The spectrum of the loss's mean gradient with respect to a prompt."""

    at: str
    """The prompt: `start`, `step 50`, `finished`."""
    spectrum: Spectrum

    def energy(self, rank: int) -> float:
        """The share of `||G||_F^2` in the first `rank` directions: `sum_{i <= rank} s_i^2 / sum_i s_i^2`."""
        squares = torch.tensor(self.spectrum.values, dtype=torch.float64).square()
        return float(squares[:rank].sum() / squares.sum())


def gradient_spectra(
    source: str | Path,
    *,
    task: str | None = None,
    data: str | None = None,
    length: int | None = None,
    batches: int = 8,
    checkpoints: bool = False,
    callback: TrainingCallback | None = None,
) -> list[GradientPoint]:
    """The gradient of a task's loss over the first batches of its training rows, at one or several prompts.

    Args:
        source: a run, for its initial prompt, its trained one and those at its checkpoints; or a backbone, for random
            rows of its vocabulary.
        task: a task's name or TOML file, for a backbone; a run has its own.
        data: where the task's rows are, as in train; None: where they were during training.
        length: virtual tokens, for a backbone; None: 100.
        batches: number of batches that the gradient is averaged over.
        checkpoints: also measure at each checkpoint.
        callback: receives progress.

    Raises:
        FileNotFoundError: there is no such run or backbone.
        ValueError: settings that do not fit the source, or a run whose loss depends on more than the prompt's matrix.
    """
    callback = callback or NullCallback()
    if batches < 1:
        raise ValueError(f"batches is {batches}; it must be at least 1")
    folder = local_folder(source)
    if (folder / runs.RECORD).is_file():
        if task is not None or length is not None:
            raise ValueError(f"{source} is a run and has its own task and length; leave --task and --length out")
        return _along(folder, data, batches, checkpoints, callback)
    if task is None:
        raise ValueError(
            f"{source} is not a run, so it is taken for a backbone, and a gradient is of a task's loss; say which with "
            "--task, or give a run"
        )
    if checkpoints:
        raise ValueError(f"{source} is a backbone and has no checkpoints; leave --checkpoints out, or give a run")
    experiment = Experiment(backbone=str(source), task=task, data=data, prompt=Plain(length=length or 100))
    definition = load_task(task, data)
    callback.on_stage(f"loading {source}")
    rows = read_splits(experiment, definition)
    backbone = with_sample_images(load(str(source)), experiment, definition, rows)
    start = runs.build_prompt(experiment, definition, backbone, initialize=False).prompt()
    gradient = gradient_on(experiment, definition, backbone, rows.train)
    return _points({"start": start}, gradient, batches, callback)


def _along(
    folder: Path, data: str | None, batches: int, checkpoints: bool, callback: TrainingCallback
) -> list[GradientPoint]:
    [loaded] = load_prompts(folder, checkpoints=checkpoints, callback=callback)
    assert loaded.run is not None
    assert loaded.backbone is not None
    reason = ""
    if loaded.prompt.is_deep:
        reason = "is of several layers"
    elif not loaded.prompt.plain:
        reason = "also changes the input's own embeddings"
    elif (folder / runs.HEAD).is_file():
        reason = "was trained with a head, which changes along the run"
    if reason:
        raise ValueError(f"the prompt of run {folder} {reason}, so its matrix alone has no gradient; give a backbone")
    run, experiment = loaded.run, loaded.run.experiment
    rows = splits_of(run, data)
    gradient = gradient_on(experiment, run.task, loaded.backbone, rows.train, teacher_of(run, loaded.backbone))
    prompts = {} if loaded.start is None else {"start": loaded.start}
    prompts |= {f"step {step}": matrix for step, matrix in loaded.history.items() if step}
    prompts["finished"] = loaded.matrix
    return _points(prompts, gradient, batches, callback)


def _points(
    prompts: dict[str, Float[Tensor, "prompt dim"]], gradient: Gradient, batches: int, callback: TrainingCallback
) -> list[GradientPoint]:
    points = []
    for name, matrix in prompts.items():
        callback.on_stage(f"gradient, {name}")
        points.append(GradientPoint(at=name, spectrum=Spectrum.of(gradient(matrix, batches))))
    return points
