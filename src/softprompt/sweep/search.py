"""Hyperparameter search by the development score: an Optuna study in a journal file, which can be resumed."""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt import files
from softprompt.config import Experiment
from softprompt.files import one_line
from softprompt.runs import Run
from softprompt.sweep.settings import set_values
from softprompt.sweep.space import Range, Search, Space
from softprompt.sweep.trial import (
    BackboneCache,
    State,
    TrialResult,
    check_contents,
    contents,
    find_run,
    resume_run,
    start_run,
    trial_name,
)
from softprompt.training.callbacks import Interrupted, Progress, TrainingCallback
from softprompt.training.step import Differentiate

JOURNAL = "study.journal"


@final
@dataclass(frozen=True)
class SearchResult:
    """The result of the search for one cell of a sweep."""

    cell: Experiment
    study: str
    """The name of the study's folder in `search`."""
    trials: tuple[TrialResult, ...]
    """The study's trials, in order."""
    values: Mapping[str, Any] | None
    """The values with the best development score (the earliest of equals); None if every trial failed."""
    dev: float | None
    """The best development score."""


class Pruned(Exception):
    """A trial was stopped because earlier ones did better at the same step."""


@final
class _PruningCallback:
    """A `TrainingCallback` that reports development scores to the study and stops a trial that the study prunes."""

    def __init__(self, callback: TrainingCallback, trial: Any, reported: Iterable[int], prune: bool) -> None:
        self._callback, self._trial, self._reported, self._prune = callback, trial, set(reported), prune

    def on_stage(self, text: str) -> None:
        """Pass the stage on."""
        self._callback.on_stage(text)

    def on_note(self, text: str) -> None:
        """Pass the note on."""
        self._callback.on_note(text)

    def on_step(self, progress: Progress) -> None:
        """Report a new development score.

        Raises:
            Pruned: the study prunes the trial.
        """
        self._callback.on_step(progress)
        if progress.dev is not None:
            self._report(progress.step, progress.dev.value, progress.steps)

    def report_history(self, run: Run) -> None:
        """Report the scores in a stopped run's metrics: its process may have died before it reported the last one.

        Raises:
            Pruned: the study prunes the trial.
        """
        for line in run.metrics():
            if "dev" in line:
                self._report(line["step"], line["dev"], run.experiment.training.steps)

    def _report(self, step: int, dev: float, steps: int) -> None:
        """Report a score unless it was reported before; at the last step nothing is pruned, since nothing is saved."""
        if step not in self._reported:
            self._reported.add(step)
            self._trial.report(dev, step)
        # Optuna decides by the last score reported; earlier scores were decided on when they were new.
        if self._prune and step == max(self._reported) < steps and self._trial.should_prune():
            raise Pruned


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ModuleNotFoundError(
            "a search needs Optuna; install it in softprompt's clone with: pip install '.[sweep]'"
        )


def run_search(
    cell: Experiment,
    search: Search,
    out: Path,
    cache: BackboneCache,
    callback: TrainingCallback,
    differentiate: Differentiate,
) -> SearchResult:
    """Run the cell's study in `out/search` until it has all its trials; an error caused by the values fails one trial.

    Only development scores are used, never test scores.

    Raises:
        Interrupted: Ctrl-C; what is done is saved.
        OSError, ImportError: files, disk, network or an installed package failed, or another process is working on the
            study or a run, independently of the values; the trial is run again next time.
        ValueError: the study was started on other rows, another context or another initial prompt.
    """
    check_optuna()
    name = search.study(cell)
    folder = out / "search" / name
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        study = _open_study(folder / JOURNAL, name, search)
        now = contents(cell, cache, f"search {name}", callback)
        check_contents(study.user_attrs, now, folder)
        for what in sorted(now.keys() - study.user_attrs.keys()):
            study.set_user_attr(what, now[what])
        run_now: set[int] = set()
        for number in range(search.trials):
            if number < len(study.trials) and study.trials[number].state.is_finished():
                continue
            callback.on_note(f"search {name}: trial {number + 1} of {search.trials}")
            run_now.add(number)
            _run_study_trial(study, number, cell, search, folder, cache, callback, differentiate)
        return _search_result(study, cell, search, folder, name, run_now)


@final
class _Unlocked:
    """Replaces Optuna's lock, which would outlive a killed process; the study's folder is already locked."""

    def acquire(self) -> bool:
        """Do nothing."""
        return True

    def release(self) -> None:
        """Do nothing."""


def _open_study(journal: Path, name: str, search: Search) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _repair_journal(journal)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=_Unlocked()))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=search.warmup)
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _repair_journal(journal: Path) -> None:
    """Remove an incomplete last line left by a killed process, to which Optuna would append."""
    if journal.is_file() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        with journal.open("rb+") as stream:
            stream.truncate(text.rfind(b"\n") + 1)


def _sampler(search: Search, number: int) -> Any:
    """A sampler for one trial, seeded by the search and the trial's number, so that resuming changes no draw."""
    import optuna

    seed = int(hashlib.sha256(f"{search.seed}:{number}".encode()).hexdigest()[:8], 16)
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.warmup)


def _run_study_trial(
    study: Any,
    number: int,
    cell: Experiment,
    search: Search,
    folder: Path,
    cache: BackboneCache,
    callback: TrainingCallback,
    differentiate: Differentiate,
) -> None:
    import optuna

    space = search.fitting(cell)
    if number == len(study.trials):
        study.enqueue_trial(_sample_values(study, number, search, space))
    is_waiting = study.trials[number].state == optuna.trial.TrialState.WAITING
    # A trial that is not waiting was started by a process that has been stopped.
    trial = study.ask() if is_waiting else optuna.trial.Trial(study, study.trials[number]._trial_id)
    values = {name: _suggest(trial, name, dimension) for name, dimension in space.items()}
    reported = study.trials[number].intermediate_values
    pruning_callback = _PruningCallback(callback, trial, reported, search.prune)
    try:
        experiment = set_values(cell, values)
        run = _finished_run(experiment, folder, cache, pruning_callback, differentiate)
    except (Interrupted, OSError, ImportError):  # these say nothing about the values
        raise
    except Pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except Exception as error:
        trial.set_user_attr("problem", one_line(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, float((run.results or {})["dev"]))


def _finished_run(
    experiment: Experiment,
    folder: Path,
    cache: BackboneCache,
    callback: _PruningCallback,
    differentiate: Differentiate,
) -> Run:
    """The experiment's run, trained to its end if it is unfinished; trials with equal values share a run."""
    run = find_run(experiment, folder)
    if run is None:
        return start_run(experiment, folder, cache, callback, differentiate)
    if run.results is not None:
        return run
    callback.report_history(run)
    return resume_run(run, experiment, cache, callback, differentiate)


def _sample_values(study: Any, number: int, search: Search, space: Space) -> dict[str, Any]:
    """The values of a trial, sampled on a copy of the study in memory, so that the journal gets all of them or none."""
    import optuna

    copy = optuna.create_study(direction="maximize", sampler=_sampler(search, number))
    copy.add_trials(study.trials)
    trial = copy.ask()
    return {name: _suggest(trial, name, dimension) for name, dimension in space.items()}


def _suggest(trial: Any, name: str, dimension: Range | tuple[Any, ...]) -> Any:
    if not isinstance(dimension, Range):
        return trial.suggest_categorical(name, dimension)
    suggest = trial.suggest_int if dimension.integer else trial.suggest_float
    return suggest(name, dimension.low, dimension.high, log=dimension.log)


def _search_result(
    study: Any, cell: Experiment, search: Search, folder: Path, name: str, run_now: set[int]
) -> SearchResult:
    trials, best = [], None
    for trial in study.trials[: search.trials]:
        is_finished = trial.state.name == "COMPLETE"
        state: State = "pruned" if trial.state.name == "PRUNED" else "failed"
        if is_finished:
            state = "done" if trial.number in run_now else "skipped"
        try:
            experiment = set_values(cell, trial.params)
        except ValueError:
            experiment = cell
        if is_finished and (best is None or trial.value > best.value):
            best = trial
        results = {"dev": trial.value} if is_finished else {}
        problem = trial.user_attrs.get("problem", "")
        trials.append(TrialResult(folder / trial_name(experiment), experiment, state, problem, results))
    if best is None:
        return SearchResult(cell, name, tuple(trials), values=None, dev=None)
    return SearchResult(cell, name, tuple(trials), values=dict(best.params), dev=best.value)
