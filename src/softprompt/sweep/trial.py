"""One trial of a sweep: skipped if it is finished, resumed if it was started, otherwise trained."""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

from softprompt.backbones import Backbone, load
from softprompt.config import Experiment
from softprompt.evaluation.evaluate import read_splits
from softprompt.files import one_line
from softprompt.runs import RECORD, Run, init_prompt_hash, open_run, text_hash
from softprompt.tasks import Task
from softprompt.tasks.user import load_task
from softprompt.training.callbacks import Interrupted, TrainingCallback
from softprompt.training.context import read_context
from softprompt.training.step import Differentiate
from softprompt.training.trainer import resume, train
from softprompt.types import Dtype

State = Literal["done", "skipped", "pruned", "failed"]
"""`done`: trained now; `skipped`: finished before; `pruned`: stopped early by a search; `failed`: raised an error."""


@final
@dataclass(frozen=True)
class TrialResult:
    """The result of one trial."""

    folder: Path
    """The folder of the trial's run."""
    experiment: Experiment
    state: State
    problem: str = ""
    """The error of a failed trial, on one line."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """The results of a finished run."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name


@final
class BackboneCache:
    """What trials share: the last loaded backbone, and the fingerprints of their rows."""

    def __init__(self) -> None:
        self._backbone: Backbone | None = None
        self._key: tuple[str, str] | None = None
        self._fingerprints: dict[tuple[object, ...], str] = {}

    def get(self, source: str, dtype: Dtype) -> Backbone:
        """Return the backbone, loaded if it is not the last one, which is then released first."""
        if self._backbone is None or self._key != (source, dtype):
            self._backbone = self._key = None
            self._backbone = load(source, dtype=dtype)
            self._key = (source, dtype)
        return self._backbone

    def fingerprint(self, experiment: Experiment) -> str:
        """The fingerprint of the experiment's task and rows as they are now; each set of rows is read only once.

        Raises:
            OSError: the rows cannot be read.
            ValueError: the rows do not fit the task.
        """
        training = experiment.training
        draw = experiment.seed, experiment.protocol, training.shots, training.shots_balanced
        key = (experiment.task, experiment.data, *draw)
        if key not in self._fingerprints:
            task = load_task(experiment.task, experiment.data)
            self._fingerprints[key] = _fingerprint(task, read_splits(experiment, task).fingerprint)
        return self._fingerprints[key]

    def readable_fingerprint(self, experiment: Experiment, name: str, callback: TrainingCallback) -> str | None:
        """Like `fingerprint`, but None with a note about `name` if the rows cannot be read: finished runs stay valid.

        Raises:
            ValueError: the rows do not fit the task.
        """
        try:
            return self.fingerprint(experiment)
        except OSError as error:
            callback.on_note(f"{name}: its rows cannot be compared with those it was trained on: {one_line(error)}")
            return None


def _fingerprint(task: Task, rows: str) -> str:
    """The fingerprint of the task's settings that affect the model, and of its rows' fingerprint."""
    settings = {name: value for name, value in task.to_json().items() if name not in ("description", "templates")}
    # The label words once more as a list: their order is the order of the classes.
    return hashlib.sha256(json.dumps([settings, list(task.label_words), rows], sort_keys=True).encode()).hexdigest()


def trial_name(experiment: Experiment) -> str:
    """The trial's folder name: task, method, seed and the start of the content hash.

    >>> trial_name(Experiment(task="copa:dpt", seed=3))[:-8]
    'copa-dpt-dpt-3-'
    """
    task = Path(experiment.task).stem if experiment.task.endswith(".toml") else experiment.task
    slug = re.sub(r"[^A-Za-z0-9]+", "-", task).strip("-")[:60] or "task"
    return f"{slug}-{experiment.method}-{experiment.seed}-{experiment.hash[:8]}"


def find_run(experiment: Experiment, out: Path) -> Run | None:
    """The experiment's run in `out`, or None if it has not been started.

    Raises:
        ValueError: the run's folder holds another experiment, or is damaged.
    """
    folder = out / trial_name(experiment)
    if not (folder / RECORD).is_file():
        return None
    run = open_run(folder)
    if run.record.get("hash") != experiment.hash:
        raise ValueError(f"{folder} holds a different experiment than its name says; move it away")
    return run


def run_trial(
    experiment: Experiment, out: Path, cache: BackboneCache, callback: TrainingCallback, differentiate: Differentiate
) -> TrialResult:
    """Skip, resume or train the experiment's run; an error becomes the trial's result.

    Raises:
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    folder = out / trial_name(experiment)
    try:
        run = find_run(experiment, out)
        if run is not None:
            _check_unchanged(run, cache, callback)
        if run is not None and run.results is not None:
            return TrialResult(folder, experiment, "skipped", results=run.results)
        if run is None:
            run = start_run(experiment, out, cache, callback, differentiate)
        else:
            run = resume_run(run, experiment, cache, callback, differentiate)
    except Interrupted:
        raise
    except Exception as error:
        return TrialResult(folder, experiment, "failed", problem=one_line(error))
    return TrialResult(folder, experiment, "done", results=run.results or {})


def _check_unchanged(run: Run, cache: BackboneCache, callback: TrainingCallback) -> None:
    """Check that task, rows, context and initial prompt are still the run's: its hash covers only their paths."""
    recorded = {
        "rows": _fingerprint(run.task, run.record["data"]["splits"]),
        "context": run.record.get("context_file"),
        "init_prompt": run.record.get("init_prompt"),
    }
    check_contents(recorded, contents(run.experiment, cache, run.name, callback), run.folder)


def contents(experiment: Experiment, cache: BackboneCache, name: str, callback: TrainingCallback) -> dict[str, str]:
    """The hashes of what an experiment names by paths, as it is now, without what is gone: finished runs stay valid.

    Args:
        name: of the run or search, for a note about rows that cannot be read.

    Raises:
        ValueError: the rows do not fit the task, or the context is no text.
    """
    hashes = {"rows": cache.readable_fingerprint(experiment, name, callback)}
    with suppress(OSError):
        hashes["context"] = None if experiment.context is None else text_hash(read_context(experiment))
    with suppress(OSError):
        hashes["init_prompt"] = init_prompt_hash(experiment)
    return {what: value for what, value in hashes.items() if value is not None}


def check_contents(recorded: Mapping[str, str | None], now: Mapping[str, str], folder: Path) -> None:
    """Check that the contents are still those that were recorded for `folder`, as far as they were.

    Raises:
        ValueError: one has changed.
    """
    for what, value in now.items():
        if (recorded.get(what) or value) != value:
            subject = "task or the rows" if what == "rows" else what
            raise ValueError(
                f"the {subject} of {folder} changed after it was started; move it away, or choose another --out"
            )


def start_run(
    experiment: Experiment, out: Path, cache: BackboneCache, callback: TrainingCallback, differentiate: Differentiate
) -> Run:
    """Train the experiment from the first step; raises like `train`."""
    backbone = cache.get(experiment.backbone, experiment.backbone_dtype)
    name = trial_name(experiment)
    return train(experiment, out=out, name=name, backbone=backbone, callback=callback, differentiate=differentiate)


def resume_run(
    run: Run, experiment: Experiment, cache: BackboneCache, callback: TrainingCallback, differentiate: Differentiate
) -> Run:
    """Resume the run from its last checkpoint, or from the first step; raises like `resume`.

    Args:
        experiment: the experiment as it is requested now, perhaps with other memory options.
    """
    backbone = cache.get(run.experiment.backbone, run.experiment.backbone_dtype)
    same_dtype = backbone.precision == run.record["backbone"]["dtype"]
    return resume(
        run.folder,
        memory_options_of=experiment,
        callback=callback,
        backbone=backbone if same_dtype else None,
        differentiate=differentiate,
    )
