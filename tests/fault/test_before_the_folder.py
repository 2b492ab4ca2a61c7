"""A training that cannot work is refused before its folder exists, whatever the reason: nothing is left to clean up."""

import csv
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from softprompt import Experiment, Plain, TrainingConfig, resume, sweep, train
from softprompt.backbones import load
from softprompt.models import PromptedModel
from softprompt.training.tracking import TrackerFailed, check_tracker

QUICK = TrainingConfig(steps=2, batch_size=4, eval_steps=2, max_new_tokens=4)


def experiment(folder: Path, task: Path, **changes: Any) -> Experiment:
    return Experiment(
        **{"backbone": str(folder), "task": str(task), "dtype": "float32", "training": QUICK, **changes},
        prompt=Plain(length=4),
    )


def table(folder: Path, rows: Sequence[tuple[str, str]], answer: str = "target") -> Path:
    with (folder / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "answer"), *rows])
    file = folder / "own.toml"
    file.write_text(f'train = "rows.csv"\ntemplate = "Text: {{text}}\\nAnswer:"\n{answer} = "answer"\n')
    return file


def left_in(out: Path) -> list[str]:
    return [path.name for path in out.iterdir()] if out.exists() else []


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_row_of_any_split_is_checked_first(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    def refuse(self: PromptedModel, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        if f"({split} split)" in where:
            raise ValueError(f"{where} does not fit")

    monkeypatch.setattr(PromptedModel, "check_row", refuse)
    with pytest.raises(ValueError, match=rf"row \d+ of .*train.csv \({split} split\) does not fit"):
        train(experiment(llama_folder, ticket_task), out=tmp_path / "runs")
    assert left_in(tmp_path / "runs") == []


def test_row_is_checked_in_a_sweep_too(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PromptedModel, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        raise ValueError(f"{where} does not fit")

    monkeypatch.setattr(PromptedModel, "check_row", refuse)
    file = tmp_path / "sweep.toml"
    lines = [f'backbone = "{llama_folder}"', f'task = "{ticket_task}"', 'dtype = "float32"', "seed = [0, 1]"]
    file.write_text("\n".join([*lines, "[training]", "steps = 1"]))
    for together in (1, 2):
        swept = sweep(file, out=tmp_path / "runs", concurrent=together)
        assert [trial.state for trial in swept.trials] == ["failed", "failed"]
    assert left_in(tmp_path / "runs") == []


def refused(
    expected: str, error: type[Exception], folder: Path, task: Path, out: Path, name: str | None = None, **more: Any
) -> None:
    before = left_in(out)
    with pytest.raises(error, match=expected):
        train(experiment(folder, task, **more.pop("changes", {})), out=out, name=name, **more)
    assert left_in(out) == before


def test_name_that_is_taken_is_refused_before_the_backbone_is_loaded(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("softprompt.training.setup.load", lambda *_, **__: pytest.fail("it was loaded"))
    refused("mine exists and is never overwritten", FileExistsError, llama_folder, ticket_task, tmp_path, "mine")
    refused("no plain folder name", ValueError, llama_folder, ticket_task, tmp_path, "../up")


def test_out_that_cannot_be_written_is_refused_first(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refused("choose another --out", OSError, llama_folder, ticket_task, tmp_path / "file" / "runs")


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow", "comet_ml"])
def test_tracker_that_is_not_installed_is_refused_with_the_remedy(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, name: str
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    out = tmp_path / "runs"
    refused(f"pip install {name.replace('_', '-')}", ModuleNotFoundError, llama_folder, ticket_task, out, log_with=name)
    done = train(experiment(llama_folder, ticket_task), out=out)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        resume(done.folder, log_with=name)


def test_tracker_that_nobody_knows_is_refused_with_the_known_ones(
    llama_folder: Path, ticket_task: Path, tmp_path: Path
) -> None:
    refused("choose one of .*tensorboard", ValueError, llama_folder, ticket_task, tmp_path / "r", log_with="foo")
    check_tracker(None)


def test_tracker_that_does_not_start_leaves_no_folder(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no login")

    monkeypatch.setattr(importlib.import_module("softprompt.training.trainer"), "check_tracker", lambda name: None)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_, **__: [])
    refused(
        "wandb does not start .no login.", TrackerFailed, llama_folder, ticket_task, tmp_path / "r", log_with="wandb"
    )


def test_long_answers_are_told_before_the_first_step(llama_folder: Path, tmp_path: Path) -> None:
    rows = [("fine" if number % 2 else "poor", "good " * (1 + 9 * (number % 2))) for number in range(40)]
    notes: list[str] = []
    train(experiment(llama_folder, table(tmp_path, rows)), out=tmp_path / "runs", watch=_Notes(notes))
    [note] = [text for text in notes if "can never be right" in text]
    assert "--max-new-tokens" in note
    few = experiment(
        llama_folder, tmp_path / "own.toml", training=TrainingConfig(steps=1, batch_size=4, max_new_tokens=100)
    )
    notes.clear()
    train(few, out=tmp_path / "runs", watch=_Notes(notes))
    assert not [text for text in notes if "can never be right" in text]


class _Notes:
    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self.steps: list[Any] = []

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        self._notes.append(text)

    def step(self, progress: Any) -> None:
        self.steps.append(progress)


def test_score_is_shown_at_the_step_it_is_of_alone(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    watch = _Notes([])
    every = TrainingConfig(steps=6, batch_size=4, eval_steps=2)
    train(experiment(llama_folder, ticket_task, training=every), out=tmp_path, watch=watch)
    assert [progress.step for progress in watch.steps if progress.dev is not None] == [2, 4, 6]


def test_finished_run_says_that_it_is_finished(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    done, notes = train(experiment(llama_folder, ticket_task), out=tmp_path), list[str]()
    again = resume(done.folder, watch=_Notes(notes), backbone=load(str(llama_folder), dtype="float32"))
    assert again.results == done.results
    assert any("finished after 2 steps" in note and f"--init-prompt {done.folder}" in note for note in notes)


def test_all_metrics_are_results(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    results = train(experiment(llama_folder, ticket_task), out=tmp_path).results
    assert results is not None
    assert results["metric"] == "accuracy"
    assert set(results["others"]) == {"macro_f1"}
