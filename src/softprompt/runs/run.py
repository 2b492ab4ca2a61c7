"""A run's folder: written whole or not at all, never overwritten, read without running any code."""

import dataclasses
import errno
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt import __version__, files
from softprompt.backbones import Backbone, load
from softprompt.config import Experiment
from softprompt.models import PromptedModel, attach, fresh_head
from softprompt.models.baselines import tune
from softprompt.prompts import Folded, SoftPrompt
from softprompt.prompts.deep import build
from softprompt.tasks import Task

Gradient = Callable[[Float[Tensor, "length dim"], int], Float[Tensor, "length dim"]]
"""The loss's mean gradient at a prompt, over a number of batches of training rows."""
RECORD = "softprompt.json"
TENSORS = "softprompt.safetensors"
HEAD = "head.safetensors"
TUNED = "tuned.safetensors"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.jsonl"
_FORMAT = 1
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EACCES)
"""What a system says of a folder's rename to a name that is taken."""


@final
@dataclass(frozen=True)
class Run:
    """A folder with one experiment in it."""

    folder: Path
    experiment: Experiment
    task: Task
    record: Mapping[str, Any]
    """Versions, backbone hash and, once finished, results."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def results(self) -> Mapping[str, Any] | None:
        """What came out; none while it is not finished."""
        return self.record.get("results")

    def finish(self, trained: PromptedModel, results: Mapping[str, Any]) -> "Run":
        """Keep what was trained and its results; the record is written last, so a run with results is whole."""
        for file, part in ((TENSORS, trained.prompt), (HEAD, trained.head), (TUNED, trained.tuned)):
            if part is not None:
                files.write_tensors(self.folder / file, part.state_dict())
        record = {**self.record, "results": dict(results)}
        files.write_text(self.folder / RECORD, json.dumps(record, indent=1))
        return Run(self.folder, self.experiment, self.task, record)

    def backbone(self, given: Backbone | str | None = None) -> Backbone:
        """The backbone that this run was trained on, loaded.

        Args:
            given: a loaded one, which is taken as it is; or a source as `load_backbone` takes it, for weights that lie
                elsewhere now: loaded in the run's dtype, so that they can be told from others.

        Raises:
            FileNotFoundError: it is not where the run recorded it, nor at `given`.
            ValueError: the weights at `given` are not the run's, or as `load_backbone` raises.
        """
        if isinstance(given, Backbone):
            return given
        if given is not None:
            found = load(given, dtype=self.record["backbone"]["dtype"])
            self._refuse_other(found)
            return found
        recorded = self.experiment.backbone
        try:
            return load(recorded, dtype=self.experiment.backbone_dtype)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"run {self.folder} recorded the backbone {recorded}, which cannot be loaded ({error}); if it lies "
                "elsewhere now, give that place with --backbone"
            ) from error

    def prompt(self, backbone: Backbone) -> SoftPrompt:
        """The trained prompt, for `backbone`.

        Raises:
            ValueError: the run is not finished, its file is damaged, or it was trained on another backbone.
        """
        self._refuse_unfit(backbone)
        if self.experiment.baseline != "none":
            raise ValueError(f"run {self.folder} is the baseline {self.experiment.baseline} and has no prompt")
        prompt = first_prompt(self.experiment, self.task, backbone, warm=False)
        files.load_tensors(prompt, files.read_tensors(self.folder / TENSORS), str(self.folder / TENSORS))
        return prompt

    def _refuse_unfit(self, backbone: Backbone) -> None:
        if self.results is None:
            raise ValueError(f"run {self.folder} is not finished; go on with: softprompt train --resume {self.folder}")
        self._refuse_other(backbone)

    def _refuse_other(self, backbone: Backbone) -> None:
        if (width := self.record["backbone"]["dim"]) != backbone.dim:
            raise ValueError(
                f"run {self.folder} was trained on {self.experiment.backbone} ({width} wide), and {backbone.source} is "
                f"{backbone.dim} wide; use the backbone it was trained on"
            )
        recorded = self.record["backbone"]
        same_dtype = recorded["dtype"] == backbone.precision
        if same_dtype and recorded["hash"] != backbone.hash:
            raise ValueError(
                f"the weights of {backbone.source} are not those that run {self.folder} was trained on; "
                "use the backbone it was trained on"
            )

    def prompted(self, backbone: Backbone) -> PromptedModel:
        """The folded prompt, with its head where it has one, in front of `backbone`; raises as `prompt` does."""
        self._refuse_unfit(backbone)
        attached = build_prompted_model(self.experiment, self.task, backbone, warm=False)
        for file, part in ((TENSORS, attached.prompt), (HEAD, attached.head), (TUNED, attached.tuned)):
            if part is not None:
                files.load_tensors(part, files.read_tensors(self.folder / file), str(self.folder / file))
        return attached.folded()

    def predictions(self) -> list[dict[str, Any]]:
        """The answers on the test split, in its order, as `evaluate.prediction_line` makes them."""
        return [json.loads(line) for line in (self.folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line cut by a killed process is left out."""
        path = self.folder / METRICS
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def rewind_metrics(self, step: int) -> None:
        """Forget the lines after `step`; they will be written again."""
        kept = [json_line(line) for line in self.metrics() if line["step"] <= step]
        files.write_text(self.folder / METRICS, "".join(kept))


def build_prompted_model(
    experiment: Experiment, task: Task, backbone: Backbone, *, warm: bool, gradient: Gradient | None = None
) -> PromptedModel:
    """What is trained, as it is before the first step: the prompt or the baseline's weights, and the head.

    Args:
        warm: as of `first_prompt`.
        gradient: as of `first_prompt`.

    Raises:
        ValueError: the prompt, its place or the baseline does not fit the backbone.
    """
    copied, tuned = tune(backbone, experiment.baseline)
    generator = torch.Generator().manual_seed(experiment.seed)
    head = fresh_head(backbone, len(task.label_words), generator, experiment.pool)
    if experiment.baseline != "none":
        return attach(copied, head=head, tuned=tuned)
    prompt = first_prompt(experiment, task, backbone, warm=warm, gradient=gradient).to(backbone.device)
    return attach(
        backbone,
        prompt,
        head=head,
        prompt_position=experiment.prompt_position,
        prompt_attention=experiment.prompt_attention,
    )


def first_prompt(
    experiment: Experiment, task: Task, backbone: Backbone, *, warm: bool, gradient: Gradient | None = None
) -> SoftPrompt:
    """The prompt before the first step.

    Args:
        warm: start as the experiment says: from its `start`, if it has one, or from a gradient. Not needed for a prompt
            that will be loaded.
        gradient: the loss's mean gradient at a prompt over some batches, for a method that starts from it.
    """
    start, depth = None, backbone.layers if experiment.depth == "deep" else 1
    if warm and experiment.init_prompt is not None:
        folded = read_prompt(Path(experiment.init_prompt).expanduser(), backbone).fold()
        if not folded.plain:
            raise ValueError(
                f"the prompt to start from, {experiment.init_prompt}, also changes the input's own embeddings, which a "
                "new prompt cannot take over; start from a plain one (plain, dpt, residual, ...)"
            )
        if folded.depth != depth:
            raise ValueError(
                f"the prompt to start from, {experiment.init_prompt}, is of {folded.depth} layers and the new one of "
                f"{depth}; give both the same depth"
            )
        start = folded.prompt().detach().cpu()
    generator = torch.Generator().manual_seed(experiment.seed)
    hosts = backbone.hosts(depth, task.answers, start)
    if not warm:  # what is made of it is replaced by what is loaded; any matrix of its shape will do
        hosts = [dataclasses.replace(host, gradient=lambda rows, batches: rows) for host in hosts]
    elif depth == 1:  # of a deep prompt, a layer's gradient would depend on the layers that are not built yet
        hosts = [dataclasses.replace(host, gradient=gradient) for host in hosts]
    return build(experiment.prompt, hosts, generator)


def create(experiment: Experiment, task: Task, backbone: Backbone, out: Path, name: str | None, data: str) -> Run:
    """A new folder `out/name` with the experiment's record.

    Args:
        name: none: made from task, method and seed, with a number where it is taken.
        data: fingerprint of the rows.

    Raises:
        FileExistsError: `name` is given and taken.
        ValueError: `name` is no plain folder name.
    """
    stem = f"{task.name}-{experiment.method}-{experiment.seed}"
    files.check_name(stem, "run name")
    check_place(out, name)
    record = {
        "format": _FORMAT,
        "hash": experiment.hash,
        "experiment": experiment.to_json(),
        "task": task.to_json(),
        "data": data,
        "backbone": {
            "base": backbone.base,
            "dim": backbone.dim,
            "hash": backbone.hash,
            "dtype": backbone.precision,
            "architecture": backbone.architecture,
            "note": backbone.note,
        },
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": None,
    }
    return Run(_claim(out, name, stem, json.dumps(record, indent=1)), experiment, task, record)


def check_place(out: Path, name: str | None) -> None:
    """Refuse what `create` could not make, before a backbone is loaded for it.

    Raises:
        FileExistsError: `name` is given and taken.
        ValueError: `name` is no plain folder name.
        OSError: nothing can be written in `out`.
    """
    if name is not None:
        files.check_name(name, "run name")
        if (out / name).exists():
            raise FileExistsError(_taken(out / name))
    above = out.expanduser().absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise OSError(
            f"{out} cannot be written in ({above} is no folder that this user may write to); choose another --out"
        )


def _taken(folder: Path) -> str:
    return f"run {folder} exists and is never overwritten; choose another --name, or use --resume {folder}"


def open_run(folder: str | Path) -> Run:
    """The run in `folder`.

    Raises:
        FileNotFoundError: there is no run there.
        ValueError: its record is damaged or from a later version.
    """
    path = Path(folder).expanduser()
    if not (path / RECORD).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no run: it has no {RECORD}; see softprompt list runs")
    record = files.read_json(path / RECORD)
    if record.get("format") != _FORMAT:
        raise ValueError(f"{path / RECORD} has format {record.get('format')!r}, this version reads {_FORMAT}; upgrade")
    try:
        experiment, task = Experiment.from_json(record["experiment"]), Task.from_json(record["task"])
        backbone = record["backbone"]
        _ = record["data"], backbone["dim"], backbone["hash"], backbone["dtype"], backbone["base"], backbone["note"]
    except KeyError as error:
        raise ValueError(f"{path / RECORD} lacks {error}; it is damaged, train again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path / RECORD} says what cannot be ({error}); it is damaged, or its method needs its --prompt-module"
        ) from error
    return Run(path, experiment, task, record)


def opened(run: Run | str | Path) -> Run:
    """The run, or the one in that folder; raises as `open_run` does, or `TypeError` for anything else."""
    if isinstance(run, Run):
        return run
    if not isinstance(run, str | Path):
        raise TypeError(f"the run is a {type(run).__name__}; give a Run (softprompt.open_run) or its folder")
    return open_run(run)


def run_folders(out: Path) -> list[Path]:
    """The folders below `out` that hold a run, by name, readable or not."""
    return [record.parent for record in sorted(out.glob(f"*/{RECORD}")) if not record.parent.name.startswith(".")]


def list_runs(out: Path) -> list[Run]:
    """Every run below `out`, by name; raises as `open_run` does."""
    return [open_run(folder) for folder in run_folders(out)]


def read_prompt(folder: Path, backbone: Backbone) -> SoftPrompt:
    """The prompt of a run, or of a plain PEFT prompt-tuning folder, for `backbone`."""
    if (folder / RECORD).is_file():
        return open_run(folder).prompt(backbone)
    file = folder / "adapter_model.safetensors"
    if not file.is_file() and not file.with_suffix(".bin").is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds neither a run ({RECORD}) nor a PEFT prompt ({file.name})")
    tensors = files.read_adapter(folder)
    if "prompt_embeddings" not in tensors or len(tensors) > 1:
        raise ValueError(
            f"{file} holds {', '.join(sorted(tensors))}; a plain PEFT prompt holds prompt_embeddings alone"
        )
    matrix = tensors["prompt_embeddings"].float()
    if matrix.ndim != 2 or matrix.shape[1] != backbone.dim or not bool(matrix.isfinite().all()):
        raise ValueError(
            f"{file} has a prompt of shape {tuple(matrix.shape)}; {backbone.source} takes finite rows of {backbone.dim}"
        )
    return Folded(matrix)


def json_line(values: Mapping[str, Any]) -> str:
    """One line of a JSONL file."""
    return json.dumps(values) + "\n"


def versions() -> dict[str, str]:
    """What computed it."""
    packages = ("torch", "transformers", "accelerate", "datasets", "safetensors")
    return {
        "softprompt": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _claim(out: Path, name: str | None, stem: str, record: str) -> Path:
    """A folder that nobody had, with its record in it from the first moment; the rename decides between two processes.

    Raises:
        FileExistsError: `name` is given and taken, or every name is.
    """
    for count in range(1, 10_000):
        folder = out / (name or (stem if count == 1 else f"{stem}-{count}"))
        try:
            with files.atomic_write(folder) as draft:
                draft.mkdir()
                (draft / RECORD).write_text(record, encoding="utf-8")
        except OSError as error:
            if error.errno not in _TAKEN or not folder.exists():
                raise
            if name is not None:
                raise FileExistsError(_taken(folder)) from None
        else:
            return folder
    raise FileExistsError(f"{out} has 9,999 runs named {stem}; give a --name")
