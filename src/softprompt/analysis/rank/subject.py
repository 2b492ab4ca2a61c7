"""Whose rank is measured: a run's prompt with all that is known of its course, or the matrix of a PEFT folder."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from jaxtyping import Float
from torch import Tensor

from softprompt import files, runs
from softprompt.analysis.rank.spectrum import Spectrum
from softprompt.backbones import Backbone
from softprompt.evaluation.evaluate import run_splits
from softprompt.prompts import Folded
from softprompt.runs import Run
from softprompt.training import checkpoint, setup
from softprompt.training.callbacks import NullCallback, TrainingCallback
from softprompt.training.gradients import gradient_on

_ADAPTER = "adapter_model.safetensors"
_MATRIX = "prompt_embeddings"


@final
@dataclass(frozen=True, kw_only=True)
class LoadedPrompt:
    """A trained prompt whose rank is measured."""

    name: str
    """The folder's name."""
    folder: Path
    prompt: Folded
    """What was trained; its matrix is measured, and what it does to the input's own embeddings is left out."""
    start: Float[Tensor, "prompt dim"] | None = None
    """The matrix before the first step; none where that is not known."""
    course: Mapping[int, Float[Tensor, "prompt dim"]] = field(default_factory=dict)
    """The matrix at each checkpoint, by step, the start as step 0."""
    whole: bool = True
    """Whether `prompt` is all that was trained; false for an adapter of which the matrix alone can be read."""
    note: str = ""
    """What a reader of the numbers should know."""
    run: Run | None = None
    """None for a PEFT folder."""
    backbone: Backbone | None = None
    """The run's, loaded; none for a PEFT folder."""

    @property
    def matrix(self) -> Float[Tensor, "prompt dim"]:
        """The prompt's matrix."""
        return self.prompt.prompt()

    @property
    def most(self) -> int:
        """The largest rank that a matrix of its shape (a layer's share of it, in a deep prompt) can have."""
        length, dim = self.matrix.shape
        return min(length // self.prompt.depth, dim)


def views(
    matrix: Float[Tensor, "prompt dim"], start: Float[Tensor, "prompt dim"] | None = None, depth: int = 1
) -> dict[str, Spectrum]:
    """The spectrum of the prompt `P`, of its rows less their mean (`centred`), and of what was learned, `P - P_0`.

    A prompt that starts from vocabulary rows has full rank before it has learned anything, and one direction, the
    rows' mean, may hold most of its size: the update tells more than the prompt. A deep prompt is a matrix a layer,
    and has these views of each: `prompt of layer 1`, and so on.
    """
    if depth == 1:
        return _views(matrix, start)
    firsts = [None] * depth if start is None else start.chunk(depth)
    return {
        f"{name} of layer {number}": found
        for number, (part, first) in enumerate(zip(matrix.chunk(depth), firsts, strict=True), 1)
        for name, found in _views(part, first).items()
    }


def _views(matrix: Float[Tensor, "prompt dim"], start: Float[Tensor, "prompt dim"] | None) -> dict[str, Spectrum]:
    whole = Spectrum.of(matrix)
    found = {"prompt": whole, "centred": Spectrum.of(matrix - matrix.mean(0), whole.values[0])}
    if start is not None:
        found["update"] = Spectrum.of(matrix - start, max(whole.values[0], Spectrum.of(start).values[0]))
    return found


def subjects(
    folder: str | Path, *, checkpoints: bool = False, backbone: str | None = None, watch: TrainingCallback | None = None
) -> Iterator[LoadedPrompt]:
    """The prompt of a run or a PEFT folder, or of every finished run in a folder of runs, by name.

    Args:
        checkpoints: also read the prompt at each checkpoint.
        backbone: where the runs' backbone lies now, as `load_backbone` takes it; none: where they had it.
        watch: receives what is read, and which runs are skipped and why.

    Raises:
        FileNotFoundError: nothing is there whose rank could be measured.
        ValueError: a damaged or unfinished run, or a PEFT folder without a prompt.
    """
    path, watch = Path(folder).expanduser(), watch or NullCallback()
    if (path / runs.RECORD).is_file():
        run = runs.open_run(path)
        if reason := _nothing(run):
            raise ValueError(f"run {path} {reason}; give a finished run of a prompt method")
        watch.on_stage(f"loading {run.experiment.backbone}")
        yield _of_run(run, run.backbone(backbone), checkpoints)
    elif (path / _ADAPTER).is_file():
        if checkpoints:
            raise ValueError(f"{path} is a PEFT folder and has no checkpoints; leave --checkpoints out, or give a run")
        yield _of_adapter(path)
    else:
        yield from _of_folder(path, checkpoints, backbone, watch)


def _of_folder(path: Path, checkpoints: bool, backbone: str | None, watch: TrainingCallback) -> Iterator[LoadedPrompt]:
    kept: dict[tuple[str, str, str], Backbone] = {}
    count = 0
    for run in runs.list_runs(path):
        if reason := _nothing(run):
            watch.on_note(f"{run.name} {reason} and is left out")
            continue
        key = (run.experiment.backbone, run.experiment.backbone_dtype, run.record["backbone"]["dtype"])
        if key not in kept:
            kept.clear()  # one at a time: a folder may hold runs of many backbones
            watch.on_stage(f"loading {run.experiment.backbone}")
            kept[key] = run.backbone(backbone)
        count += 1
        yield _of_run(run, kept[key], checkpoints)
    if not count:
        raise FileNotFoundError(
            f"{str(path)!r} is neither a run, a PEFT folder ({_ADAPTER}) nor a folder with finished runs of a prompt "
            "method; see softprompt list runs"
        )


def _nothing(run: Run) -> str:
    """Why a run has no prompt to measure; empty where it has one."""
    if run.experiment.baseline != "none":
        return f"is the baseline {run.experiment.baseline} and has no prompt"
    return "is not finished" if run.results is None else ""


def _of_run(run: Run, backbone: Backbone, checkpoints: bool) -> LoadedPrompt:
    prompt, notes = run.prompt(backbone).fold(), []
    if not prompt.plain:
        notes.append("it also changes the input's own embeddings, which is left out: the matrix alone is measured")
    try:
        seen = with_sample_images(run, backbone)
        gradient = gradient_on(run.experiment, run.task, seen, lambda: run_splits(run).train)
        start = runs.build_prompt(run.experiment, run.task, seen, initialize=True, gradient=gradient).prompt().detach()
    except (FileNotFoundError, ValueError) as error:  # a warm start whose folder is gone, images that have changed
        start = None
        notes.append(f"its first prompt is not known, so what it learned is not measured ({error})")
    return LoadedPrompt(
        name=run.name,
        folder=run.folder,
        prompt=prompt,
        start=start,
        course=_course(run, backbone, start) if checkpoints else {},
        note="; ".join(notes),
        run=run,
        backbone=backbone,
    )


def with_sample_images(run: Run, backbone: Backbone) -> Backbone:
    """`backbone` as the run's first prompt saw it: with some of the training images, where it reads images."""
    if not run.task.image:
        return backbone
    return setup.with_sample_images(backbone, run.experiment, run.task, run_splits(run))


def _course(
    run: Run, backbone: Backbone, start: Float[Tensor, "prompt dim"] | None
) -> dict[int, Float[Tensor, "prompt dim"]]:
    prompt = runs.build_prompt(run.experiment, run.task, backbone, initialize=False)
    found = {} if start is None else {0: start}
    for step in checkpoint.steps(run.folder):
        file = checkpoint.folder_of(run.folder, step) / "prompt.safetensors"
        own = {
            name.removeprefix("prompt."): tensor
            for name, tensor in files.read_tensors(file).items()
            if name.startswith("prompt.")  # a head may stand beside it
        }
        files.load_tensors(prompt, own, str(file))
        found[step] = prompt.prompt().detach().clone()
    if set(found) <= {0}:
        raise ValueError(f"run {run.folder} has no checkpoints left; leave --checkpoints out")
    return found


def _of_adapter(path: Path) -> LoadedPrompt:
    """Any adapter with a prompt's matrix, also such as stock PEFT cannot load: the matrix is all that is read."""
    file = path / _ADAPTER
    tensors = files.read_tensors(file, "save the adapter again, or fetch it again")
    matrix = tensors.pop(_MATRIX, None)
    if matrix is None:
        raise ValueError(f"{file} holds {', '.join(sorted(tensors))} and no {_MATRIX}; give a prompt-tuning adapter")
    if matrix.ndim != 2 or not matrix.is_floating_point() or not bool(matrix.isfinite().all()):
        raise ValueError(f"{file} has a prompt of shape {tuple(matrix.shape)}; a prompt is a matrix of finite numbers")
    note = "its first prompt is not known, so what it learned is not measured"
    if tensors:
        note += f"; its {', '.join(sorted(tensors))} are left out: the matrix alone is measured"
    name = path.resolve().name
    return LoadedPrompt(name=name, folder=path, prompt=Folded(matrix.float()), whole=not tensors, note=note)
