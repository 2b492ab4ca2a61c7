"""A search that is stopped anywhere gives the same result; file and network errors do not count as results."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from softprompt import Experiment, Run, TrainingConfig
from softprompt.runs import METRICS
from softprompt.sweep import SweepResult, executor, search, sweep
from softprompt.sweep import trial as trial_module
from softprompt.tasks import TASKS
from softprompt.training.callbacks import NullCallback

STOPS: dict[str, tuple[Any, str, int]] = {
    "between two random draws": (optuna.trial.Trial, "suggest_categorical", 2),
    "between two draws of the sampler": (optuna.trial.Trial, "suggest_categorical", 5),
    "before the report of the score that prunes": (optuna.trial.Trial, "report", 13),
    "before a pruned trial is recorded": (optuna.Study, "tell", 4),
    "in a step of another trial": (search._PruningCallback, "on_step", 6),
}
"""The call that is interrupted, and its count. Three trials of four steps come before the first pruned one."""


@pytest.fixture(scope="module")
def file(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search for a learning rate and a rank, with both kinds of sampling and with pruned trials."""
    path = tmp_path_factory.mktemp("search") / "search.toml"
    path.write_text(
        f"""
        backbone = "{llama_folder}"
        task = "{ticket_task}"
        dtype = "float32"
        training = {{ steps = 4, batch_size = 8, eval_steps = 1 }}
        prompt.length = 4
        prompt.anchor = "none"
        [search]
        trials = 6
        warmup = 3
        space.training.lr = {{ low = 0.001, high = 1 }}
        space.prompt.rank = [1, 2, 3, 4]
        """
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(file: Path) -> SweepResult:
    """The search that was never stopped."""
    result = sweep(file, out=file.parent / "whole")
    states = [trial.state for trial in result.searches[0].trials]
    assert states[:4] == ["done", "done", "done", "pruned"]
    assert steps(result)[3] == 1
    return result


def steps(result: SweepResult) -> list[int]:
    """The number of steps that each trial was trained."""
    [study_result] = result.searches
    return [len((trial.folder / METRICS).read_text().splitlines()) for trial in study_result.trials]


def outcome(result: SweepResult) -> list[Any]:
    [study_result] = result.searches
    trials = [(trial.name, trial.state == "pruned", trial.results) for trial in study_result.trials]
    return [study_result.values, study_result.dev, trials, steps(result)]


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_search_gives_the_same_result(
    stop: str, file: Path, uninterrupted: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, count = STOPS[stop]
    call, calls = getattr(owner, name), itertools.count(1)

    def stop_at_count(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, stop_at_count)
    with pytest.raises(KeyboardInterrupt):
        sweep(file, out=tmp_path)
    assert outcome(sweep(file, out=tmp_path)) == outcome(uninterrupted)


@pytest.mark.parametrize("kind", [ConnectionError, ModuleNotFoundError, BlockingIOError])
def test_error_of_the_environment_fails_no_search_trial(
    kind: type[Exception], file: Path, uninterrupted: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network, a package that is not installed, a run that another process holds."""

    def fail(*_: Any) -> None:
        raise kind("no values would do")

    with monkeypatch.context() as patch:
        patch.setattr(search, "start_run", fail)
        [failed] = sweep(file, out=tmp_path).failed
    assert failed.problem == "no values would do"
    assert outcome(sweep(file, out=tmp_path)) == outcome(uninterrupted)


def test_search_refuses_changed_rows(file: Path, uninterrupted: SweepResult, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", Path(uninterrupted.trials[0].experiment.task).with_name("train.csv")
    shutil.copytree(rows.parent, tmp_path / "task")
    own_file = tmp_path / "search.toml"
    own_file.write_text(
        file.read_text().replace(str(rows.parent), str(tmp_path / "task")).replace("trials = 6", "trials = 1")
    )
    assert not sweep(own_file, out=out).failed
    (tmp_path / "task/train.csv").write_text(rows.read_text().replace("a a", "a b a"))
    [study_result] = sweep(own_file, out=out).searches
    [failed] = study_result.trials
    assert (failed.state, study_result.values) == ("failed", None)
    changed = f"the task or the rows of {out / 'search' / study_result.study} changed after it was started;"
    assert failed.problem.startswith(changed)


@pytest.mark.parametrize("name", ["context", "init_prompt"])
def test_search_refuses_another_context_or_initial_prompt(
    name: str, file: Path, uninterrupted: SweepResult, tmp_path: Path
) -> None:
    def write(version: int) -> None:
        if name == "context":
            (tmp_path / name).write_text(f"version {version}")
        else:
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            shutil.copytree(uninterrupted.searches[0].trials[version].folder, tmp_path / name)

    own_file = tmp_path / "search.toml"

    def trials(count: int) -> SweepResult:
        lines = file.read_text().replace("trials = 6", f"trials = {count}")
        own_file.write_text(f'{name} = "{tmp_path / name}"\n' + lines)
        return sweep(own_file, out=tmp_path / "out")

    write(0)
    assert not trials(1).failed
    write(1)
    [failed] = trials(2).searches[0].trials
    assert failed.state == "failed"
    assert failed.problem.startswith(f"the {name} of {tmp_path / 'out' / 'search'}")
    assert "changed after it was started" in failed.problem


def test_lost_ray_worker_has_a_problem() -> None:
    """Ray's TaskCancelledError, for one, has an empty message."""

    class RayError(Exception):
        pass

    def get(_: object) -> None:
        raise RayError

    task = SimpleNamespace(
        options=lambda **_: SimpleNamespace(remote=lambda job, experiment: f"ref of {experiment.seed}")
    )
    ray = SimpleNamespace(
        remote=lambda _: task,
        wait=lambda pending, num_returns: (pending[:1], pending[1:]),
        get=get,
        exceptions=SimpleNamespace(RayError=RayError),
    )
    experiments = [Experiment(seed=0), Experiment(seed=1)]
    results = executor._ray_executor(ray, 1, 0)(print, experiments, lambda experiment, problem: (experiment, problem))
    assert list(results) == [(experiment, "its worker is lost: RayError") for experiment in experiments]


def test_reported_history_does_not_prune(tmp_path: Path) -> None:
    """After a kill during the final test; Optuna decides by the last score, whichever line is reported."""
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    for _ in range(2):
        done = study.ask()
        done.report(0.5, 2)
        done.report(0.9, 4)
        study.tell(done, 0.9)
    trial = study.ask()
    trial.report(0.6, 2)
    trial.report(0.7, 4)
    assert trial.should_prune()
    (tmp_path / METRICS).write_text('{"step": 2, "dev": 0.6}\n{"step": 4, "dev": 0.7}\n')
    experiment = Experiment(training=TrainingConfig(steps=4))
    run = Run(folder=tmp_path, experiment=experiment, task=TASKS["cb"], record={})
    search._PruningCallback(NullCallback(), trial, [2, 4], prune=True).report_history(run)


def test_finished_search_needs_no_rows(
    file: Path, uninterrupted: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(file.parent / "whole", tmp_path / "runs")

    def fail_to_read(*_: Any) -> Any:
        raise FileNotFoundError("train.csv does not exist")

    monkeypatch.setattr(trial_module, "read_splits", fail_to_read)
    result = sweep(file, out=tmp_path / "runs")
    assert outcome(result)[:2] == outcome(uninterrupted)[:2]
    assert not result.failed
