"""A search that is stopped anywhere comes to what it would have come to; files and network are no answer to it."""

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
    "before the score is reported that prunes": (optuna.trial.Trial, "report", 13),
    "before a pruned trial's end is told": (optuna.Study, "tell", 4),
    "in another trial's step": (search._Pruning, "step", 6),
}
"""The call that is not made any more, and the how many-th. Three trials of four steps come before the first pruned."""


@pytest.fixture(scope="module")
def file(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of a rate and a rank, with draws of both kinds of sampling, and trials that are pruned."""
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
def whole(file: Path) -> SweepResult:
    """The search that nothing stopped."""
    swept = sweep(file, out=file.parent / "whole")
    states = [trial.state for trial in swept.searches[0].trials]
    assert states[:4] == ["done", "done", "done", "pruned"]
    assert steps(swept)[3] == 1
    return swept


def steps(swept: SweepResult) -> list[int]:
    """How far each trial was trained."""
    [found] = swept.searches
    return [len((trial.folder / METRICS).read_text().splitlines()) for trial in found.trials]


def said(swept: SweepResult) -> list[Any]:
    [found] = swept.searches
    trials = [(one.name, one.state == "pruned", one.results) for one in found.trials]
    return [found.values, found.dev, trials, steps(swept)]


@pytest.mark.parametrize("stop", STOPS)
def test_stopped(stop: str, file: Path, whole: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, count = STOPS[stop]
    call, calls = getattr(owner, name), itertools.count(1)

    def stopped(*given: Any, **named: Any) -> Any:
        if next(calls) == count:
            raise KeyboardInterrupt
        return call(*given, **named)

    monkeypatch.setattr(owner, name, stopped)
    with pytest.raises(KeyboardInterrupt):
        sweep(file, out=tmp_path)
    assert said(sweep(file, out=tmp_path)) == said(whole)


def test_a_network_that_fails_is_no_answer(
    file: Path, whole: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreached(*_: Any) -> None:
        raise ConnectionError("the hub cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(search, "start", unreached)
        [failed] = sweep(file, out=tmp_path).failed
    assert failed.problem == "the hub cannot be reached"
    assert said(sweep(file, out=tmp_path)) == said(whole)


def test_a_search_on_other_rows_is_another_one(file: Path, whole: SweepResult, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", Path(whole.trials[0].experiment.task).with_name("train.csv")
    shutil.copytree(rows.parent, tmp_path / "task")
    own = tmp_path / "search.toml"
    own.write_text(
        file.read_text().replace(str(rows.parent), str(tmp_path / "task")).replace("trials = 6", "trials = 1")
    )
    assert not sweep(own, out=out).failed
    (tmp_path / "task/train.csv").write_text(rows.read_text().replace("a a", "a b a"))
    [found] = sweep(own, out=out).searches
    [failed] = found.trials
    assert (failed.state, found.values) == ("failed", None)
    assert failed.problem.startswith(f"{out / 'search' / found.study} was begun on another task or on other rows;")


def test_a_worker_that_is_lost_without_a_word_has_a_problem() -> None:
    """As Ray's own TaskCancelledError, whose text is empty."""

    class RayError(Exception):
        pass

    def get(_: object) -> None:
        raise RayError

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda work, item: f"ref of {item.seed}"))
    ray = SimpleNamespace(
        remote=lambda _: task,
        wait=lambda waiting, num_returns: (waiting[:1], waiting[1:]),
        get=get,
        exceptions=SimpleNamespace(RayError=RayError),
    )
    items = [Experiment(seed=0), Experiment(seed=1)]
    found = executor._ray_each(ray, 1, 0)(print, items, lambda item, problem: (item, problem))
    assert list(found) == [(item, "its worker is lost: RayError") for item in items]


def test_the_last_score_does_not_prune_when_an_earlier_one_is_gone_through_again(tmp_path: Path) -> None:
    """Killed while it was tested, and begun again; Optuna judges by the last score, whichever line is in hand."""
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
    search._Pruning(NullCallback(), trial, [2, 4], prune=True).go_on(run)


def test_a_finished_search_stands_without_its_rows(
    file: Path, whole: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(file.parent / "whole", tmp_path / "runs")

    def away(*_: Any) -> Any:
        raise FileNotFoundError("there is no file train.csv")

    monkeypatch.setattr(trial_module, "read_splits", away)
    swept = sweep(file, out=tmp_path / "runs")
    assert said(swept)[:2] == said(whole)[:2]
    assert not swept.failed
