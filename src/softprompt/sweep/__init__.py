"""Many experiments from one file: each trained once, whatever stops the sweep between."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

from softprompt import files
from softprompt.config import Experiment
from softprompt.runs import RECORD
from softprompt.sweep.executor import Executor, ExecutorName, Work, opened
from softprompt.sweep.plan import Plan, expand, read
from softprompt.sweep.search import SearchResult, choose, need_optuna
from softprompt.sweep.settings import set_values
from softprompt.sweep.space import Range, Search
from softprompt.sweep.trial import BackboneCache, TrialResult, begun, run_trial, sentence, trial_name
from softprompt.training.callbacks import Interrupted, NullCallback, TrainingCallback
from softprompt.training.step import Differentiate

__all__ = [
    "ExecutorName",
    "Plan",
    "Range",
    "Search",
    "SearchResult",
    "SweepResult",
    "TrialResult",
    "expand",
    "read",
    "standing",
    "sweep",
    "trial_name",
]


@final
@dataclass(frozen=True)
class SweepResult:
    """What became of a sweep."""

    trials: tuple[TrialResult, ...]
    """Of the file's experiments, in its order."""
    searches: tuple[SearchResult, ...] = ()
    """What was chosen before, where the file leaves something to choose."""

    @property
    def failed(self) -> tuple[TrialResult, ...]:
        """Trials with a problem, those of the searches first."""
        every = [*(trial for found in self.searches for trial in found.trials), *self.trials]
        return tuple(trial for trial in every if trial.state == "failed")


def sweep(
    file: str | Path,
    *,
    out: str | Path = "runs",
    data: str | Path | None = None,
    executor: ExecutorName = "local",
    concurrent: int = 1,
    ray_address: str | None = None,
    cpus: int | float = 1,
    gpus: int | float = 0,
    watch: TrainingCallback | None = None,
) -> SweepResult:
    """Run every experiment of a sweep's file that is not finished yet, each in a folder of its own in `out`.

    A finished run is skipped, an unfinished one resumed; a trial that raises fails alone. Where the file has a
    `[search]`, its values are chosen first, by development scores alone, and then trained with the file's seeds.

    Args:
        file: see `softprompt.sweep.plan.read`.
        out: where the runs are kept; on a cluster, a folder that every machine has.
        data: the folder in which the file's relative `data` begins.
        executor: this process, or a Ray cluster (extra `sweep`), to the same results.
        concurrent: trainings at a time in this process, a step of each and one pass over the rows of all; to the
            results of each by itself, but for rounding. More of them need more memory.
        ray_address: the cluster's; none: one on this machine for the time of the sweep.
        cpus: processors a trial, of Ray.
        gpus: graphics processors a trial, of Ray.
        watch: who is told how it goes.

    Raises:
        FileNotFoundError, ValueError: the file, by key and value; nothing has been trained then.
        Interrupted: Ctrl-C; the same call goes on.
        ModuleNotFoundError: the extra `sweep` is missing where it is needed.
    """
    _refuse_several_processes()
    _refuse_concurrent(concurrent, executor)
    plan, watch, folder = read(file, data), watch or NullCallback(), Path(out).expanduser().resolve()
    if plan.search:
        need_optuna()
    if executor == "ray":
        _refuse_strangers(plan.experiments)
    with opened(executor, watch, at_once=concurrent, ray_address=ray_address, cpus=cpus, gpus=gpus) as each:
        try:
            searches = _searched(plan, folder, each, watch) if plan.search else ()
            trials = _by_backbone(_chosen(plan, searches))
            for found in searches:
                _adopt(found, trials, folder)
            done = {}
            count = f"of {len(trials)}"
            lost = partial(_lost, folder)
            for outcome in each(partial(_trial, folder), trials, lost):
                done[outcome.experiment.hash] = outcome
                watch.note(f"trial {len(done)} {count}: {outcome.name} {outcome.problem or outcome.state}")
        except Interrupted as error:
            raise Interrupted(f"{str(error).partition(';')[0]}; the same sweep command goes on from there") from None
    order = _chosen(plan, searches)
    return SweepResult(tuple(done[experiment.hash] for experiment in order), searches)


def trial_status(plan: Plan, out: str | Path) -> list[tuple[str, Literal["finished", "begun", "new"]]]:
    """Every experiment's run in `out` by name, and whether it is there; of a search its studies.

    Raises:
        ValueError: a run is damaged.
    """
    found: list[tuple[str, Literal["finished", "begun", "new"]]] = []
    folder = Path(out).expanduser()
    for study in dict.fromkeys(plan.search.study(cell) for cell in _cells(plan)) if plan.search else ():
        found.append((f"search/{study}", "begun" if (folder / "search" / study).exists() else "new"))
    for experiment in plan.experiments:
        if plan.search and plan.search.cell(experiment):
            continue
        run = begun(experiment, folder)
        found.append((trial_name(experiment), "new" if run is None else "begun" if run.results is None else "finished"))
    return found


def _cells(plan: Plan) -> Iterator[Experiment]:
    for experiment in plan.experiments:
        if plan.search and (cell := plan.search.cell(experiment)) is not None:
            yield cell


def _searched(plan: Plan, out: Path, each: Executor, watch: TrainingCallback) -> tuple[SearchResult, ...]:
    assert plan.search is not None
    cells = {cell.hash: cell for cell in _cells(plan)}
    work: Work[SearchResult] = partial(_search, plan.search, out)
    found = {}
    for one in each(work, _by_backbone(cells.values()), partial(_lost_search, plan.search, out)):
        watch.note(f"search {one.study}: {one.values or 'nothing'} with development score {one.dev}")
        found[one.cell.hash] = one
    return tuple(found[name] for name in cells)


# At module level, and with the item first among what `each` gives: a cluster's workers import them by name.
def _trial(
    out: Path, experiment: Experiment, held: BackboneCache, watch: TrainingCallback, differentiate: Differentiate
) -> TrialResult:
    return run_trial(experiment, out, held, watch, differentiate)


def _search(
    search: Search,
    out: Path,
    cell: Experiment,
    held: BackboneCache,
    watch: TrainingCallback,
    differentiate: Differentiate,
) -> SearchResult:
    try:
        return choose(cell, search, out, held, watch, differentiate)
    except Interrupted:
        raise
    except Exception as error:
        return _lost_search(search, out, cell, sentence(error))


def _lost(out: Path, experiment: Experiment, problem: str) -> TrialResult:
    return TrialResult(out / trial_name(experiment), experiment, "failed", problem)


def _lost_search(search: Search, out: Path, cell: Experiment, problem: str) -> SearchResult:
    study = search.study(cell)
    return SearchResult(cell, study, (TrialResult(out / "search" / study, cell, "failed", problem),), None, None)


def _chosen(plan: Plan, searches: Sequence[SearchResult]) -> list[Experiment]:
    """The experiments with the chosen values; those of a search in which every trial failed are left out."""
    if plan.search is None:
        return list(plan.experiments)
    values = {found.cell.hash: found.values for found in searches}
    chosen: dict[str, Experiment] = {}
    for experiment in plan.experiments:
        cell = plan.search.cell(experiment)
        if cell is None:
            chosen.setdefault(experiment.hash, experiment)
        elif (best := values[cell.hash]) is not None:
            whole = set_values(experiment, best)
            chosen.setdefault(whole.hash, whole)
    return list(chosen.values())


def _adopt(found: SearchResult, trials: Sequence[Experiment], out: Path) -> None:
    """Copy a finished run of the search, if it is still there, that is one of the sweep's own trials."""
    wanted = {experiment.hash for experiment in trials}
    for trial in found.trials:
        place = out / trial.name
        if trial.experiment.hash not in wanted or place.exists():
            continue
        if trial.results and (trial.folder / RECORD).is_file():
            with files.atomic_write(place) as draft:
                shutil.copytree(trial.folder, draft)


def _by_backbone(experiments: Any) -> list[Experiment]:
    """Those on one backbone together, so that it is loaded once; else in their order."""
    return sorted(experiments, key=lambda one: (one.backbone, one.backbone_dtype))


def _refuse_several_processes() -> None:
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"the sweep was started as {count} processes; start it alone, several trials at once need ray")


def _refuse_concurrent(concurrent: int, executor: ExecutorName) -> None:
    if concurrent < 1:
        raise ValueError(f"concurrent is {concurrent}; it must be at least 1")
    if concurrent > 1 and executor == "ray":
        raise ValueError("concurrent is for trainings in this process, and ray has a process for each; leave one out")


def _refuse_strangers(experiments: Sequence[Experiment]) -> None:
    for experiment in experiments:
        if not type(experiment.prompt).__module__.startswith("softprompt."):
            raise ValueError(
                f"the method {experiment.method} comes from a --prompt-module, which the workers of a cluster do not "
                "have; leave out --executor ray"
            )
