"""Values chosen by the development score: an Optuna study in a journal file, which goes on where it stopped."""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from softprompt import files
from softprompt.config import Experiment
from softprompt.runs import Run
from softprompt.sweep.settings import set_values
from softprompt.sweep.space import Range, Search, Space
from softprompt.sweep.trial import BackboneCache, State, TrialResult, begun, go_on, sentence, start, trial_name
from softprompt.training.callbacks import Interrupted, Progress, TrainingCallback
from softprompt.training.step import Differentiate

JOURNAL = "study.journal"


@final
@dataclass(frozen=True)
class SearchResult:
    """What a search came to, for one cell of a sweep."""

    cell: Experiment
    study: str
    """Its folder's name below `search`."""
    trials: tuple[TrialResult, ...]
    """In the order of the draws."""
    values: Mapping[str, Any] | None
    """The values with the best development score, the earliest of equals; none where every trial failed."""
    dev: float | None
    """That score."""


class Pruned(Exception):
    """A training was stopped because others did better at the same step."""


@final
class _Pruning:
    """A `TrainingCallback` that reports each development score to the study and ends a training that it prunes."""

    def __init__(self, watch: TrainingCallback, trial: Any, reported: Iterable[int], prune: bool) -> None:
        self._watch, self._trial, self._reported, self._prune = watch, trial, set(reported), prune

    def stage(self, text: str) -> None:
        """Pass it on."""
        self._watch.stage(text)

    def note(self, text: str) -> None:
        """Pass it on."""
        self._watch.note(text)

    def step(self, progress: Progress) -> None:
        """Judge by a new score."""
        self._watch.step(progress)
        if progress.dev is None:
            return
        self._judge(progress.step, progress.dev.value, progress.steps)

    def go_on(self, run: Run) -> None:
        """Judge by the scores that a stopped process has left: it may have died before it could report the last."""
        for line in run.metrics():
            if "dev" in line:
                self._judge(line["step"], line["dev"], run.experiment.training.steps)

    def _judge(self, step: int, dev: float, steps: int) -> None:
        """Report a score once; at the last step nothing is pruned, there is nothing left to save."""
        if step not in self._reported:
            self._reported.add(step)
            self._trial.report(dev, step)
        # Optuna judges by the last score reported, whichever is in hand; an earlier one was judged in its time.
        if self._prune and step == max(self._reported) < steps and self._trial.should_prune():
            raise Pruned


def need_optuna() -> None:
    """Refuse a search without the extra `sweep`.

    Raises:
        ModuleNotFoundError: Optuna is missing.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ModuleNotFoundError("a search needs Optuna; install it with: pip install 'softprompt[sweep]'")


def choose(
    cell: Experiment,
    search: Search,
    out: Path,
    held: BackboneCache,
    watch: TrainingCallback,
    differentiate: Differentiate,
) -> SearchResult:
    """Go on with the cell's study in `out/search` until it has all its trials; what its values raise ends a trial.

    Test scores are never looked at.

    Raises:
        Interrupted: Ctrl-C; what is done is kept.
        OSError: files, disk or network fail, which says nothing of the values; the trial is begun again next time.
        RuntimeError: another process is at this study.
        ValueError: the study was begun on other rows.
    """
    need_optuna()
    name = search.study(cell)
    folder = out / "search" / name
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        study = _study(folder / JOURNAL, name, search)
        rows = held.rows_if_readable(cell, f"search {name}", watch)
        if rows is not None:
            _refuse_other_rows(study, folder, rows)
        fresh: set[int] = set()
        for number in range(search.trials):
            if number < len(study.trials) and study.trials[number].state.is_finished():
                continue
            watch.note(f"search {name}: trial {number + 1} of {search.trials}")
            fresh.add(number)
            _one(study, number, cell, search, folder, held, watch, differentiate)
        return _found(study, cell, search, folder, name, fresh)


@final
class _Unlocked:
    """In place of Optuna's lock, which would outlive a killed process: the study's folder is locked already."""

    def acquire(self) -> bool:
        """At once."""
        return True

    def release(self) -> None:
        """Nothing."""


def _study(journal: Path, name: str, search: Search) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    _mend(journal)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal), lock_obj=_Unlocked()))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=search.warmup)
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", pruner=pruner, load_if_exists=True
    )


def _refuse_other_rows(study: Any, folder: Path, rows: str) -> None:
    if study.user_attrs.get("rows", rows) != rows:
        raise ValueError(f"{folder} was begun on another task or on other rows; move it away, or choose another --out")
    if "rows" not in study.user_attrs:
        study.set_user_attr("rows", rows)


def _mend(journal: Path) -> None:
    """Cut off a last line that a killed process left unfinished: Optuna would write on behind it."""
    if journal.is_file() and (text := journal.read_bytes()) and not text.endswith(b"\n"):
        with journal.open("rb+") as stream:
            stream.truncate(text.rfind(b"\n") + 1)


def _sampler(search: Search, number: int) -> Any:
    """A sampler for one trial: its draws follow the seed and the trial's number, however often the study stopped."""
    import optuna

    seed = int(hashlib.sha256(f"{search.seed}:{number}".encode()).hexdigest()[:8], 16)
    if search.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.warmup)


def _one(
    study: Any,
    number: int,
    cell: Experiment,
    search: Search,
    folder: Path,
    held: BackboneCache,
    watch: TrainingCallback,
    differentiate: Differentiate,
) -> None:
    import optuna

    space = search.fitting(cell)
    if number == len(study.trials):
        study.enqueue_trial(_drawn(study, number, search, space))
    waits = study.trials[number].state == optuna.trial.TrialState.WAITING
    # One that runs was begun by a process that was stopped.
    trial = study.ask() if waits else optuna.trial.Trial(study, study.trials[number]._trial_id)
    values = {name: _draw(trial, name, choice) for name, choice in space.items()}
    known = study.trials[number].intermediate_values
    try:
        experiment = set_values(cell, values)
        run = _trained(experiment, folder, held, _Pruning(watch, trial, known, search.prune), differentiate)
    except (Interrupted, OSError):
        raise
    except Pruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except Exception as error:
        trial.set_user_attr("problem", sentence(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
    else:
        study.tell(trial, float((run.results or {})["dev"]))


def _trained(
    experiment: Experiment, folder: Path, held: BackboneCache, watch: _Pruning, differentiate: Differentiate
) -> Run:
    """The finished run; two trials with equal values share it."""
    run = begun(experiment, folder)
    if run is None:
        return start(experiment, folder, held, watch, differentiate)
    if run.results is not None:
        return run
    watch.go_on(run)
    return go_on(run, experiment, held, watch, differentiate)


def _drawn(study: Any, number: int, search: Search, space: Space) -> dict[str, Any]:
    """The values of a trial, drawn on a copy in memory: whatever stops a process, none are drawn without the others."""
    import optuna

    copy = optuna.create_study(direction="maximize", sampler=_sampler(search, number))
    copy.add_trials(study.trials)
    trial = copy.ask()
    return {name: _draw(trial, name, choice) for name, choice in space.items()}


def _draw(trial: Any, name: str, choice: Range | tuple[Any, ...]) -> Any:
    if not isinstance(choice, Range):
        return trial.suggest_categorical(name, choice)
    suggest = trial.suggest_int if choice.whole else trial.suggest_float
    return suggest(name, choice.low, choice.high, log=choice.log)


def _found(study: Any, cell: Experiment, search: Search, folder: Path, name: str, fresh: set[int]) -> SearchResult:
    outcomes, best = [], None
    for trial in study.trials[: search.trials]:
        finished = trial.state.name == "COMPLETE"
        states: dict[str, State] = {"COMPLETE": "done" if trial.number in fresh else "skipped", "PRUNED": "pruned"}
        try:
            experiment = set_values(cell, trial.params)
        except ValueError:
            experiment = cell
        if finished and (best is None or trial.value > best.value):
            best = trial
        place = folder / trial_name(experiment)
        problem = trial.user_attrs.get("problem", "")
        results = {"dev": trial.value} if finished else {}
        outcomes.append(TrialResult(place, experiment, states.get(trial.state.name, "failed"), problem, results))
    return SearchResult(
        cell, name, tuple(outcomes), None if best is None else dict(best.params), None if best is None else best.value
    )
