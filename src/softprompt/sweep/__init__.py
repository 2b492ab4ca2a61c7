"""Sweeps: many experiments from one file, each trained once, however often the sweep is stopped."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, final

from softprompt import files
from softprompt.config import Experiment
from softprompt.files import one_line
from softprompt.runs import RECORD
from softprompt.sweep.executor import Executor, ExecutorName, Job, open_executor, sharing_key
from softprompt.sweep.plan import Plan, expand, read
from softprompt.sweep.search import SearchResult, check_optuna, run_search
from softprompt.sweep.settings import set_values
from softprompt.sweep.space import Range, Search
from softprompt.sweep.trial import BackboneCache, TrialResult, find_run, run_trial, trial_name
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
    "sweep",
    "trial_name",
    "trial_status",
]


@final
@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep."""

    trials: tuple[TrialResult, ...]
    """The file's experiments, in its order."""
    searches: tuple[SearchResult, ...] = ()
    """The studies of the file's `[search]`."""

    @property
    def failed(self) -> tuple[TrialResult, ...]:
        """The failed trials, those of the searches first."""
        trials = [*(trial for search in self.searches for trial in search.trials), *self.trials]
        return tuple(trial for trial in trials if trial.state == "failed")


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
    callback: TrainingCallback | None = None,
) -> SweepResult:
    """Run every unfinished experiment of a sweep's file, each in its own folder in `out`.

    Finished runs are skipped and unfinished ones resumed; an error fails only its own trial. If the file has a
    `[search]`, values are first chosen by development scores alone, and then trained with the file's seeds.

    Args:
        file: see `softprompt.sweep.plan.read`.
        out: the folder that holds the runs; with Ray, one that every machine can access.
        data: the folder that relative `data` in the file starts from; None: the file's own folder.
        executor: this process, or a Ray cluster (extra `sweep`), with the same results.
        concurrent: the number of runs trained concurrently in this process over one backbone, with the same results up
            to rounding; more need more memory.
        ray_address: the address of a Ray cluster; None: a local one for the duration of the sweep.
        cpus: CPUs per trial, for Ray.
        gpus: GPUs per trial, for Ray.
        callback: receives the progress.

    Raises:
        FileNotFoundError, ValueError: the file is invalid, by key and value; nothing has been trained.
        Interrupted: Ctrl-C; the same call continues the sweep.
        ModuleNotFoundError: the extra `sweep` is needed and not installed.
    """
    _check_single_process()
    _check_concurrent(concurrent, executor)
    _check_resources(executor, ray_address, cpus, gpus)
    plan, callback, folder = read(file, data), callback or NullCallback(), Path(out).expanduser().resolve()
    if plan.search:
        check_optuna()
    if executor == "ray":
        _check_importable(plan.experiments)
    with open_executor(
        executor, callback, concurrent=concurrent, ray_address=ray_address, cpus=cpus, gpus=gpus
    ) as execute:
        try:
            searches = _run_searches(plan, folder, execute, callback) if plan.search else ()
            experiments = _chosen_experiments(plan, searches)
            for search in searches:
                _adopt_runs(search, experiments, folder)
            results: dict[str, TrialResult] = {}
            on_lost = partial(_lost_trial, folder)
            for result in execute(partial(_trial_job, folder), sorted(experiments, key=sharing_key), on_lost):
                results[result.experiment.hash] = result
                count = f"{len(results)} of {len(experiments)}"
                callback.on_note(f"trial {count}: {result.name} {result.problem or result.state}")
        except Interrupted as error:
            raise Interrupted(f"{str(error).partition(';')[0]}; the same sweep command continues from there") from None
    return SweepResult(tuple(results[experiment.hash] for experiment in experiments), searches)


def trial_status(plan: Plan, out: str | Path) -> list[tuple[str, Literal["finished", "unfinished", "new"]]]:
    """The name and the status of every trial in `out`; for experiments of a search, those of its studies.

    Raises:
        ValueError: a run is damaged.
    """
    status: list[tuple[str, Literal["finished", "unfinished", "new"]]] = []
    folder = Path(out).expanduser()
    for study in dict.fromkeys(plan.search.study(cell) for cell in _cells(plan)) if plan.search else ():
        status.append((f"search/{study}", "unfinished" if (folder / "search" / study).exists() else "new"))
    for experiment in plan.experiments:
        if plan.search and plan.search.cell(experiment):
            continue
        run = find_run(experiment, folder)
        state: Literal["finished", "unfinished", "new"] = (
            "new" if run is None else "unfinished" if run.results is None else "finished"
        )
        status.append((trial_name(experiment), state))
    return status


def _cells(plan: Plan) -> Iterator[Experiment]:
    """The experiments that studies are run for."""
    for experiment in plan.experiments:
        if plan.search and (cell := plan.search.cell(experiment)) is not None:
            yield cell


def _run_searches(plan: Plan, out: Path, execute: Executor, callback: TrainingCallback) -> tuple[SearchResult, ...]:
    assert plan.search is not None
    cells = {cell.hash: cell for cell in _cells(plan)}
    job: Job[SearchResult] = partial(_search_job, plan.search, out)
    results: dict[str, SearchResult] = {}
    for result in execute(job, sorted(cells.values(), key=sharing_key), partial(_lost_search, plan.search, out)):
        callback.on_note(f"search {result.study}: {result.values or 'nothing'} with development score {result.dev}")
        results[result.cell.hash] = result
    return tuple(results[name] for name in cells)


# At module level, since Ray workers import jobs by name; what is bound by `partial` comes first.
def _trial_job(
    out: Path, experiment: Experiment, cache: BackboneCache, callback: TrainingCallback, differentiate: Differentiate
) -> TrialResult:
    return run_trial(experiment, out, cache, callback, differentiate)


def _search_job(
    search: Search,
    out: Path,
    cell: Experiment,
    cache: BackboneCache,
    callback: TrainingCallback,
    differentiate: Differentiate,
) -> SearchResult:
    try:
        return run_search(cell, search, out, cache, callback, differentiate)
    except Interrupted:
        raise
    except Exception as error:
        return _lost_search(search, out, cell, one_line(error))


def _lost_trial(out: Path, experiment: Experiment, problem: str) -> TrialResult:
    return TrialResult(out / trial_name(experiment), experiment, "failed", problem)


def _lost_search(search: Search, out: Path, cell: Experiment, problem: str) -> SearchResult:
    study = search.study(cell)
    return SearchResult(cell, study, (TrialResult(out / "search" / study, cell, "failed", problem),), None, None)


def _chosen_experiments(plan: Plan, searches: Sequence[SearchResult]) -> list[Experiment]:
    """The plan's experiments with the values that searches chose, without those whose search failed altogether."""
    if plan.search is None:
        return list(plan.experiments)
    values = {search.cell.hash: search.values for search in searches}
    experiments: dict[str, Experiment] = {}
    for experiment in plan.experiments:
        cell = plan.search.cell(experiment)
        if cell is not None:
            best = values[cell.hash]
            if best is None:
                continue
            experiment = set_values(experiment, best)
        experiments.setdefault(experiment.hash, experiment)
    return list(experiments.values())


def _adopt_runs(search: SearchResult, experiments: Sequence[Experiment], out: Path) -> None:
    """Copy finished runs of the search that are also trials of the sweep."""
    hashes = {experiment.hash for experiment in experiments}
    for trial in search.trials:
        target = out / trial.name
        if trial.experiment.hash not in hashes or target.exists():
            continue
        if trial.results and (trial.folder / RECORD).is_file():
            with files.atomic_write(target) as draft:
                shutil.copytree(trial.folder, draft)


def _check_single_process() -> None:
    if (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"the sweep was started as {count} processes; start one, and use --executor ray to run trials in parallel"
        )


def _check_concurrent(concurrent: int, executor: ExecutorName) -> None:
    if concurrent < 1:
        raise ValueError(f"concurrent is {concurrent}; it must be at least 1")
    if concurrent > 1 and executor == "ray":
        raise ValueError(f"concurrent is {concurrent}, but Ray runs each trial in its own process; leave one out")


def _check_resources(executor: ExecutorName, ray_address: str | None, cpus: int | float, gpus: int | float) -> None:
    """Refuse settings of Ray without Ray."""
    if executor == "local" and (ray_address is not None or (cpus, gpus) != (1, 0)):
        values = f"ray_address is {ray_address!r}, cpus {cpus:g} and gpus {gpus:g}"
        raise ValueError(f"{values}, which only a Ray cluster reads; give --executor ray too, or leave them out")


def _check_importable(experiments: Sequence[Experiment]) -> None:
    """Check that Ray workers can import every method."""
    for experiment in experiments:
        if not type(experiment.prompt).__module__.startswith("softprompt."):
            raise ValueError(
                f"the method {experiment.method} comes from a --prompt-module, which Ray workers do not have; leave "
                "out --executor ray"
            )
