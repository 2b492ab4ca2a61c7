"""One trial of a sweep: skipped where it is finished, resumed where it is begun, else trained."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from softprompt.backbones import Backbone, load
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import read_splits
from softprompt.runs import RECORD, Run, open_run
from softprompt.tasks import Task, load_task
from softprompt.training.callbacks import Interrupted, TrainingCallback
from softprompt.training.step import Differentiate
from softprompt.training.trainer import resume, train
from softprompt.types import Dtype

State = Literal["done", "skipped", "pruned", "failed"]
"""`done`: trained now; `skipped`: finished before; `pruned`: stopped by a search; `failed`: with a sentence why."""


@final
@dataclass(frozen=True)
class TrialResult:
    """What became of a trial."""

    folder: Path
    """The trial's run."""
    experiment: Experiment
    state: State
    problem: str = ""
    """Why it failed."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """Of a finished run."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


@final
class BackboneCache:
    """What trials share: the backbone of the one before, and what their rows are known by."""

    def __init__(self) -> None:
        self._backbone: Backbone | None = None
        self._key: tuple[str, str] | None = None
        self._rows: dict[tuple[object, ...], str] = {}

    def get(self, source: str, dtype: Dtype) -> Backbone:
        """The backbone, loaded if it is another than before; that one is let go first, to make room."""
        if self._backbone is None or self._key != (source, dtype):
            self._backbone = self._key = None
            self._backbone = load(source, dtype=dtype)
            self._key = (source, dtype)
        return self._backbone

    def rows(self, experiment: Experiment) -> str:
        """A fingerprint of the experiment's task and rows as they are now; equal ones are read once.

        Raises:
            OSError: they cannot be read.
            ValueError: they do not fit.
        """
        training = experiment.training
        draw = experiment.seed, experiment.protocol, training.shots, training.shots_balanced
        key = (experiment.task, experiment.data, *draw)
        if key not in self._rows:
            task = load_task(experiment.task, experiment.data)
            self._rows[key] = _fingerprint(task, read_splits(experiment, task).fingerprint)
        return self._rows[key]

    def rows_if_readable(self, experiment: Experiment, of: str, watch: TrainingCallback) -> str | None:
        """The same; none, with a note on what they are `of`, where they cannot be read: finished work stands without.

        Raises:
            ValueError: they do not fit.
        """
        try:
            return self.rows(experiment)
        except OSError as error:
            watch.note(f"{of}: whether its rows are still the same is not known: {sentence(error)}")
            return None


def _fingerprint(task: Task, rows: str) -> str:
    """Of all that a task says to the model and of its rows, by their own fingerprint."""
    said = {name: value for name, value in task.to_json().items() if name not in ("description", "templates")}
    # As a list: another order of the words is another order of the classes.
    return hashlib.sha256(json.dumps([said, list(task.label_words), rows], sort_keys=True).encode()).hexdigest()


def trial_name(experiment: Experiment) -> str:
    """Task, method, seed and the first of the content hash, as a folder's name.

    >>> trial_name(Experiment(task="copa:dpt", seed=3))[:-8]
    'copa-dpt-dpt-3-'
    """
    task = Path(experiment.task).stem if experiment.task.endswith(".toml") else experiment.task
    words = re.sub(r"[^A-Za-z0-9]+", "-", task).strip("-")[:60] or "task"
    return f"{words}-{experiment.method}-{experiment.seed}-{experiment.hash[:8]}"


def begun(experiment: Experiment, out: Path) -> Run | None:
    """The experiment's run in `out`; none where there is none yet.

    Raises:
        ValueError: its folder holds another experiment, or is damaged.
    """
    folder = out / trial_name(experiment)
    if not (folder / RECORD).is_file():
        return None
    run = open_run(folder)
    if run.record.get("hash") != experiment.hash:
        raise ValueError(f"{folder} holds another experiment than its name says; move it away")
    return run


def run_trial(
    experiment: Experiment, out: Path, held: BackboneCache, watch: TrainingCallback, differentiate: Differentiate
) -> TrialResult:
    """Bring the experiment's run to its end; what goes wrong is an outcome, so that the others go on.

    Raises:
        Interrupted: Ctrl-C; what is done is kept.
    """
    folder = out / trial_name(experiment)
    try:
        run = begun(experiment, out)
        if run is not None:
            _refuse_changed(run, held, watch)
        if run is not None and run.results is not None:
            return TrialResult(folder, experiment, "skipped", results=run.results)
        if run is None:
            run = start(experiment, out, held, watch, differentiate)
        else:
            run = go_on(run, experiment, held, watch, differentiate)
    except Interrupted:
        raise
    except Exception as error:
        return TrialResult(folder, experiment, "failed", problem=sentence(error))
    return TrialResult(folder, experiment, "done", results=run.results or {})


def _refuse_changed(run: Run, held: BackboneCache, watch: TrainingCallback) -> None:
    """The settings' hash has the paths of task and rows; what is in the files may be another since the run began.

    Raises:
        ValueError: it is.
    """
    now = held.rows_if_readable(run.experiment, run.name, watch)
    if now is not None and now != _fingerprint(run.task, run.record["data"]):
        raise ValueError(
            f"{run.folder} was trained on another task or on other rows than there are now; move it away, or choose "
            "another --out"
        )


def start(
    experiment: Experiment, out: Path, held: BackboneCache, watch: TrainingCallback, differentiate: Differentiate
) -> Run:
    """Train it from the first step; raises as `train` does."""
    backbone = held.get(experiment.backbone, experiment.backbone_dtype)
    name = trial_name(experiment)
    return train(experiment, out=out, name=name, backbone=backbone, watch=watch, differentiate=differentiate)


def go_on(
    run: Run, experiment: Experiment, held: BackboneCache, watch: TrainingCallback, differentiate: Differentiate
) -> Run:
    """Train it from its last checkpoint, or from the first step where there is none; raises as `resume` does.

    Args:
        experiment: as it is asked for now, whose means may be others than those that it was begun with.
    """
    backbone = held.get(run.experiment.backbone, run.experiment.backbone_dtype)
    fits = backbone.precision == run.record["backbone"]["dtype"]
    return resume(
        run.folder,
        memory_options_of=experiment,
        watch=watch,
        backbone=backbone if fits else None,
        differentiate=differentiate,
    )


def sentence(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, OSError, RuntimeError)) and bool(text)
    return text if plain else f"{type(error).__name__}: {text or 'no message'}"
