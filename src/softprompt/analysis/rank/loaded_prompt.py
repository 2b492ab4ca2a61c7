"""Load what is to be analyzed: a run's prompt, initial prompt and checkpoints, or a PEFT folder's matrix."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from jaxtyping import Float
from torch import Tensor

from softprompt import files, runs
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.assets.hub import local_folder
from softprompt.backbones import Backbone
from softprompt.evaluation.evaluate import run_splits
from softprompt.models.peft_folder import PROMPT, WEIGHTS, PeftFolder, is_peft_folder, read_peft_folder
from softprompt.prompts import Folded
from softprompt.runs import Run
from softprompt.training import checkpoint, setup
from softprompt.training.callbacks import NullCallback, TrainingCallback
from softprompt.training.context import teacher_of
from softprompt.training.gradients import gradient_on


@final
@dataclass(frozen=True, kw_only=True)
class LoadedPrompt:
    """A trained prompt to be analyzed."""

    name: str
    """The folder's name."""
    folder: Path
    prompt: Folded
    """The trained prompt; its matrix is analyzed, and what it does to the input's own embeddings is ignored."""
    start: Float[Tensor, "prompt dim"] | None = None
    """The matrix before the first step, `P0`; None where it is not known."""
    start_missing: str = "its folder does not record it"
    """Why `start` is not known, where it is None."""
    history: Mapping[int, Float[Tensor, "prompt dim"]] = field(default_factory=dict)
    """The matrix at each checkpoint, by step; step 0 is the start."""
    complete: bool = True
    """Whether `prompt` is all that was trained; false for an adapter of which only the matrix can be read."""
    note: str = ""
    """What a reader of the ranks should know."""
    run: Run | None = None
    """None for a PEFT folder."""
    adapter: PeftFolder | None = None
    """The PEFT folder; None for a run."""
    backbone: Backbone | None = None
    """The run's backbone, loaded; None for a PEFT folder."""

    @property
    def matrix(self) -> Float[Tensor, "prompt dim"]:
        """The prompt's matrix `P`."""
        return self.prompt.prompt()

    @property
    def max_rank(self) -> int:
        """The largest rank that a matrix of this shape can have; in a deep prompt, one of its matrices."""
        length, dim = self.matrix.shape
        return min(length // self.prompt.num_matrices, dim)


def spectra(
    matrix: Float[Tensor, "prompt dim"], start: Float[Tensor, "prompt dim"] | None = None, num_matrices: int = 1
) -> dict[str, Spectrum]:
    """The spectra of the prompt `P`, of `P` less its mean row (`centered`), and of the update `P - P0`.

    A prompt that starts from vocabulary rows has full rank before training, and the mean row alone may hold most of
    its norm, so the update is the most informative of the three. A deep prompt has these views of each of its matrices:
    `prompt of matrix 1`, and so on; in a decoder these are the keys and the values of each layer in turn.
    """
    if num_matrices == 1:
        return _matrix_spectra(matrix, start)
    starts = [None] * num_matrices if start is None else start.chunk(num_matrices)
    return {
        f"{view} of matrix {number}": spectrum
        for number, (part, part_start) in enumerate(zip(matrix.chunk(num_matrices), starts, strict=True), 1)
        for view, spectrum in _matrix_spectra(part, part_start).items()
    }


def _matrix_spectra(
    matrix: Float[Tensor, "prompt dim"], start: Float[Tensor, "prompt dim"] | None
) -> dict[str, Spectrum]:
    prompt = Spectrum.of(matrix)
    by_view = {"prompt": prompt, "centered": Spectrum.of(matrix - matrix.mean(0), prompt.values[0])}
    if start is not None:
        by_view["update"] = Spectrum.of(matrix - start, max(prompt.values[0], Spectrum.of(start).values[0]))
    return by_view


def load_prompts(
    folder: str | Path,
    *,
    checkpoints: bool = False,
    backbone: str | None = None,
    callback: TrainingCallback | None = None,
) -> Iterator[LoadedPrompt]:
    """The prompt of a run or a PEFT folder (or `hub:USER/NAME`), or of every finished run in a folder of runs, by name.

    Args:
        checkpoints: also load the prompt at each checkpoint.
        backbone: where the runs' backbone is now, as `load_backbone` takes it; None: where it was during training.
        callback: receives progress, and which runs are skipped and why.

    Raises:
        FileNotFoundError: there is no such folder, or no prompt in it.
        NotADirectoryError: it is a file.
        ValueError: a damaged or unfinished run, or a PEFT folder without a prompt.
    """
    path, callback = local_folder(folder), callback or NullCallback()
    files.check_folder(path, "give a run, a PEFT prompt or a folder of runs; see softprompt list runs")
    if (path / runs.RECORD).is_file():
        run = runs.open_run(path)
        if reason := _why_no_prompt(run):
            raise ValueError(f"run {path} {reason}; give a finished run of a prompt method")
        callback.on_stage(f"loading {run.experiment.backbone}")
        yield _of_run(run, _load_backbone(run, backbone), checkpoints)
    elif is_peft_folder(path):
        if checkpoints:
            raise ValueError(f"{path} is a PEFT folder and has no checkpoints; leave --checkpoints out, or give a run")
        yield _of_adapter(path)
    else:
        yield from _of_folder(path, checkpoints, backbone, callback)


def _of_folder(
    path: Path, checkpoints: bool, backbone: str | None, callback: TrainingCallback
) -> Iterator[LoadedPrompt]:
    cache: dict[tuple[str, str], Backbone] = {}
    count = 0
    for folder in runs.run_folders(path):
        try:
            run = runs.open_run(folder)
        except (ValueError, OSError) as error:
            callback.on_note(f"{folder.name} is left out: {files.one_line(error)}")
            continue
        if reason := _why_no_prompt(run):
            callback.on_note(f"{run.name} {reason} and is left out")
            continue
        key = (run.experiment.backbone, run.record["backbone"]["dtype"])
        if key not in cache:
            cache.clear()  # one backbone in memory at a time: the runs may have many
            callback.on_stage(f"loading {run.experiment.backbone}")
            cache[key] = _load_backbone(run, backbone)
        count += 1
        yield _of_run(run, cache[key], checkpoints)
    if not count:
        raise FileNotFoundError(
            f"{path} is neither a run ({runs.RECORD}), a PEFT folder ({WEIGHTS}) nor a folder with finished runs of a "
            "prompt method; see softprompt list runs"
        )


def _load_backbone(run: Run, source: str | None) -> Backbone:
    """The run's backbone in the run's dtype, whatever `auto` means here: P0 may consist of its embeddings."""
    dtype = run.record["backbone"]["dtype"]
    return replace(run, experiment=run.experiment.replace(dtype=dtype)).load_backbone(source)


def _why_no_prompt(run: Run) -> str:
    """Why a run has no prompt to analyze; empty where it has one."""
    if run.experiment.baseline != "none":
        return f"is the baseline {run.experiment.baseline} and has no prompt"
    if run.results is None:
        return "is not finished"
    return "" if (run.folder / runs.TENSORS).is_file() else f"lacks {runs.TENSORS}, the trained tensors, and is damaged"


def _of_run(run: Run, backbone: Backbone, checkpoints: bool) -> LoadedPrompt:
    prompt, notes = run.prompt(backbone).fold(), []
    if not prompt.plain:
        notes.append("it also changes the input's own embeddings, which is ignored: only the matrix is measured")
    start, start_missing = None, ""
    try:
        runs.check_init_prompt(run)
        host = with_sample_images(run, backbone)

        def gradient(at: Float[Tensor, "prompt dim"], batches: int) -> Float[Tensor, "prompt dim"]:
            """Reads rows and teacher only if the method initializes from the gradient."""
            teacher = teacher_of(run, backbone)
            return gradient_on(run.experiment, run.task, host, run_splits(run).train, teacher)(at, batches)

        start = runs.build_prompt(run.experiment, run.task, host, initialize=True, gradient=gradient).prompt().detach()
    except (FileNotFoundError, ValueError) as error:  # an --init-prompt folder that is gone, images that have changed
        start_missing = str(error)
        notes.append(f"its initial prompt P0 cannot be rebuilt, so its update is not measured ({error})")
    return LoadedPrompt(
        name=run.name,
        folder=run.folder,
        prompt=prompt,
        start=start,
        start_missing=start_missing,
        history=_history(run, backbone, start) if checkpoints else {},
        note="; ".join(notes),
        run=run,
        backbone=backbone,
    )


def with_sample_images(run: Run, backbone: Backbone) -> Backbone:
    """The backbone with the training images sampled as for the run's initial prompt, if its task has images."""
    if not run.task.image:
        return backbone
    return setup.with_sample_images(backbone, run.experiment, run.task, run_splits(run))


def _history(
    run: Run, backbone: Backbone, start: Float[Tensor, "prompt dim"] | None
) -> dict[int, Float[Tensor, "prompt dim"]]:
    prompt = runs.build_prompt(run.experiment, run.task, backbone, initialize=False)
    history = {} if start is None else {0: start}
    for step in checkpoint.steps(run.folder):
        file = checkpoint.folder_of(run.folder, step) / "prompt.safetensors"
        tensors = {
            name.removeprefix("prompt."): tensor
            for name, tensor in files.read_tensors(file).items()
            if name.startswith("prompt.")  # the file may also hold a head
        }
        files.load_tensors(prompt, tensors, str(file))
        history[step] = prompt.prompt().detach().clone()
    if set(history) <= {0}:
        raise ValueError(f"run {run.folder} has no checkpoints left; leave --checkpoints out")
    return history


def _of_adapter(path: Path) -> LoadedPrompt:
    """Load the prompt; only its matrix where the adapter has more tensors, as those of methods that PEFT lacks."""
    adapter = read_peft_folder(path)
    others = adapter.other_tensors if PROMPT in adapter.tensors else []
    note = "a PEFT folder does not record the initial prompt P0, so its update is not measured"
    if others:
        note += f"; its {', '.join(others)} are ignored: only the matrix is measured"
    return LoadedPrompt(
        name=Path(os.path.abspath(path)).name,  # a prompt on the Hub is a link with the prompt's name
        folder=path,
        prompt=Folded(adapter.matrix()) if others else adapter.folded(),
        start_missing="a PEFT folder does not record it",
        complete=not others,
        note=note,
        adapter=adapter,
    )
