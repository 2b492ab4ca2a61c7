"""Rows that changed or disappeared after training: no command silently gives another score."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.analysis.rank import Truncation, functional_rank
from softprompt.analysis.rank.loaded_prompt import load_prompts
from softprompt.cli import main
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate
from softprompt.prompts.plain import Plain
from softprompt.runs import Run
from softprompt.training.trainer import train

LINES = [f"{'ab'[i % 2] * (1 + i % 3)} {i},{('Billing', 'Sales')[i % 2]}" for i in range(60)]
TOML = 'train = "train.csv"\ntemplate = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n'


def write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(["text,queue", *lines]) + "\n")


@pytest.fixture
def run(tmp_path: Path, llama_folder: Path) -> Run:
    write(tmp_path / "train.csv", LINES)
    (tmp_path / "task.toml").write_text(TOML)
    training = TrainingConfig(steps=2, batch_size=4, eval_steps=2, shots=4)
    experiment = Experiment(
        backbone=str(llama_folder), task=str(tmp_path / "task.toml"), dtype="float32", training=training
    )
    return train(experiment.replace(prompt=Plain(length=3)), out=tmp_path / "runs")


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "a line less": lambda lines: lines[1:],
    "more lines": lambda lines: [*lines, *(f"c {i},Sales" for i in range(20))],
    "another word": lambda lines: [line.replace("b", "c") for line in lines],
    "another order": lambda lines: lines[::-1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("split", ["test", "dev"])
def test_evaluate_refuses_changed_rows(run: Run, tmp_path: Path, change: Callable, split: str) -> None:
    assert evaluate(run).value == (run.results or {})["test"]
    write(tmp_path / "train.csv", change(LINES))
    with pytest.raises(ValueError, match=r"train\.csv are not those that run .* --data FILE"):
        evaluate(run, split=split)
    assert evaluate(run, data=str(tmp_path / "train.csv")).n in (59, 60, 80)


def test_unread_column_may_change(run: Run, tmp_path: Path) -> None:
    lines = [f"{line},{number}" for number, line in enumerate(LINES)]
    (tmp_path / "train.csv").write_text("\n".join(["text,queue,note", *lines]) + "\n")
    assert evaluate(run).value == (run.results or {})["test"]


def test_missing_rows_name_their_path(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").rename(tmp_path / "moved.csv")
    assert main(["evaluate", str(run.folder)]) == 1
    printed = capsys.readouterr().err
    assert f"are not where it recorded them ({tmp_path / 'train.csv'})" in printed
    assert "softprompt evaluate RUN --data FILE" in printed
    assert main(["evaluate", str(run.folder), "--data", str(tmp_path / "moved.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 60


def test_functional_rank_refuses_changed_rows(run: Run, tmp_path: Path) -> None:
    [loaded] = load_prompts(run.folder)
    write(tmp_path / "train.csv", LINES[1:])
    with pytest.raises(ValueError, match="are not those that run"):
        functional_rank(loaded, Truncation(ranks=(2,)))


def test_show_refuses_changed_rows(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Predictions refer to rows by index, so changed rows would show other texts."""
    resumed = ["train", "--resume", str(run.folder), "--show", "3"]
    assert main(resumed) == 0
    assert ": answered " in capsys.readouterr().err
    write(tmp_path / "train.csv", LINES[::-1])
    main(resumed)
    printed = capsys.readouterr().err
    assert "are not those that run" in printed
    assert ": answered " not in printed
