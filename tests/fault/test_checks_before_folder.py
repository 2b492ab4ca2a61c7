"""A run that cannot work is refused before its folder exists, so that nothing is left to clean up."""

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


def files_in(out: Path) -> list[str]:
    return [path.name for path in out.iterdir()] if out.exists() else []


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_rows_of_every_split_are_checked_first(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    def check_row(self: PromptedModel, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        if f"({split} split)" in where:
            raise ValueError(f"{where} does not fit")

    monkeypatch.setattr(PromptedModel, "check_row", check_row)
    with pytest.raises(ValueError, match=rf"row \d+ of .*train.csv \({split} split\) does not fit"):
        train(experiment(llama_folder, ticket_task), out=tmp_path / "runs")
    assert files_in(tmp_path / "runs") == []


def test_rows_are_checked_first_in_a_sweep(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_row(self: PromptedModel, input_ids: Sequence[int], answer_ids: Sequence[int], where: str) -> None:
        raise ValueError(f"{where} does not fit")

    monkeypatch.setattr(PromptedModel, "check_row", check_row)
    file = tmp_path / "sweep.toml"
    lines = [f'backbone = "{llama_folder}"', f'task = "{ticket_task}"', 'dtype = "float32"', "seed = [0, 1]"]
    file.write_text("\n".join([*lines, "[training]", "steps = 1"]))
    for count in (1, 2):
        result = sweep(file, out=tmp_path / "runs", concurrent=count)
        assert [trial.state for trial in result.trials] == ["failed", "failed"]
    assert files_in(tmp_path / "runs") == []


def assert_refused(
    expected: str, error: type[Exception], folder: Path, task: Path, out: Path, name: str | None = None, **kwargs: Any
) -> None:
    before = files_in(out)
    with pytest.raises(error, match=expected):
        train(experiment(folder, task, **kwargs.pop("changes", {})), out=out, name=name, **kwargs)
    assert files_in(out) == before


def test_taken_name_is_refused_before_loading(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr("softprompt.training.setup.load", lambda *_, **__: pytest.fail("the backbone was loaded"))
    assert_refused("mine exists and is never overwritten", FileExistsError, llama_folder, ticket_task, tmp_path, "mine")
    assert_refused("not a plain folder name", ValueError, llama_folder, ticket_task, tmp_path, "../up")


def test_unwritable_out_is_refused_first(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_refused("choose another --out", OSError, llama_folder, ticket_task, tmp_path / "file" / "runs")


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow", "comet_ml"])
def test_missing_tracker_names_its_package(llama_folder: Path, ticket_task: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed here")
    out = tmp_path / "runs"
    assert_refused(
        f"pip install {name.replace('_', '-')}", ModuleNotFoundError, llama_folder, ticket_task, out, log_with=name
    )
    done = train(experiment(llama_folder, ticket_task), out=out)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        resume(done.folder, log_with=name)


def test_unknown_tracker_lists_the_known_ones(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    assert_refused("choose one of .*tensorboard", ValueError, llama_folder, ticket_task, tmp_path / "r", log_with="foo")
    check_tracker(None)


def test_failing_tracker_leaves_no_folder(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no login")

    monkeypatch.setattr(importlib.import_module("softprompt.training.trainer"), "check_tracker", lambda name: None)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_, **__: [])
    assert_refused(
        "wandb does not start .no login.", TrackerFailed, llama_folder, ticket_task, tmp_path / "r", log_with="wandb"
    )


def test_long_answers_are_noted_before_training(llama_folder: Path, tmp_path: Path) -> None:
    rows = [("fine" if number % 2 else "poor", "good " * (1 + 9 * (number % 2))) for number in range(40)]
    notes: list[str] = []
    train(experiment(llama_folder, table(tmp_path, rows)), out=tmp_path / "runs", callback=_Notes(notes))
    [note] = [text for text in notes if "can never be right" in text]
    assert "--max-new-tokens" in note
    few = experiment(
        llama_folder, tmp_path / "own.toml", training=TrainingConfig(steps=1, batch_size=4, max_new_tokens=100)
    )
    notes.clear()
    train(few, out=tmp_path / "runs", callback=_Notes(notes))
    assert not [text for text in notes if "can never be right" in text]


class _Notes:
    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self.steps: list[Any] = []

    def on_stage(self, text: str) -> None:
        pass

    def on_note(self, text: str) -> None:
        self._notes.append(text)

    def on_step(self, progress: Any) -> None:
        self.steps.append(progress)


def test_dev_score_is_reported_only_at_its_step(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    callback = _Notes([])
    every = TrainingConfig(steps=6, batch_size=4, eval_steps=2)
    train(experiment(llama_folder, ticket_task, training=every), out=tmp_path, callback=callback)
    assert [progress.step for progress in callback.steps if progress.dev is not None] == [2, 4, 6]


def test_resuming_a_finished_run_gives_a_note(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    done, notes = train(experiment(llama_folder, ticket_task), out=tmp_path), list[str]()
    resumed = resume(done.folder, callback=_Notes(notes), backbone=load(str(llama_folder), dtype="float32"))
    assert resumed.results == done.results
    assert any("finished after 2 steps" in note and f"--init-prompt {done.folder}" in note for note in notes)


def test_results_have_all_metrics(llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    results = train(experiment(llama_folder, ticket_task), out=tmp_path).results
    assert results is not None
    assert results["metric"] == "accuracy"
    assert set(results["extra_metrics"]) == {"macro_f1"}
