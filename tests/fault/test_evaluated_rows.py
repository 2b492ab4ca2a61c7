"""The rows that `evaluate` scores: all rows of a given file, else those that the run was started with."""

import csv
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softprompt.analysis.rank import Truncation, functional_rank
from softprompt.analysis.rank.loaded_prompt import load_prompts
from softprompt.cli import main
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate
from softprompt.prompts.plain import Plain
from softprompt.runs import Run
from softprompt.tasks import TASKS
from softprompt.tasks.data.splits import load_test_split
from softprompt.tasks.user import load_task
from softprompt.training.trainer import train
from softprompt.types import TruncationWarning

TEMPLATE = 'template = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n'
HEAD = ("text", "queue", "customer")


def rows(count: int, swapped: bool = False) -> list[tuple[str, ...]]:
    labels = ("Sales", "Billing") if swapped else ("Billing", "Sales")
    return [("ab"[i % 2] * (1 + i % 3) + f" {i}", labels[i % 2], f"c{i // 2}") for i in range(count)]


def write(path: Path, table: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *table])
    return str(path)


def trained(folder: Path, backbone: Path, toml: str, **settings: Any) -> Run:
    (folder / "task.toml").write_text(toml)
    training = TrainingConfig(steps=2, batch_size=4, eval_steps=2, **settings)
    experiment = Experiment(
        backbone=str(backbone), task=str(folder / "task.toml"), dtype="float32", prompt=Plain(length=3)
    )
    return train(experiment.replace(training=training), out=folder / "runs")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write(folder / "train.csv", rows(60))
    write(folder / "test.csv", rows(20))
    write(folder / "new.csv", rows(50))
    write(folder / "swapped.csv", rows(50, swapped=True))
    return folder


@pytest.fixture(scope="module", params=["cut", "test file"])
def run(request: pytest.FixtureRequest, tables: Path, llama_folder: Path) -> Run:
    more = 'test = "test.csv"\n' if request.param == "test file" else ""
    return trained(tables, llama_folder, f'train = "train.csv"\n{more}{TEMPLATE}')


def test_every_row_of_a_file_is_scored(run: Run, tables: Path) -> None:
    new, swapped = (evaluate(run, data=str(tables / name)) for name in ("new.csv", "swapped.csv"))
    assert new.n == swapped.n == 50
    assert new.value + swapped.value == pytest.approx(1)


@pytest.mark.parametrize("table", [rows(30)[::2], rows(4), rows(1)], ids=["one class", "four rows", "one row"])
def test_file_too_small_to_split_is_scored(run: Run, tmp_path: Path, table: list[tuple[str, ...]]) -> None:
    assert evaluate(run, data=write(tmp_path / "few.csv", table)).n == len(table)


def test_other_task_scores_every_row_of_a_file(run: Run, tables: Path, tmp_path: Path) -> None:
    """A file of one class must not make that class the only answer."""
    write(tmp_path / "other.csv", rows(40))
    (tmp_path / "other.toml").write_text('train = "other.csv"\n' + TEMPLATE)
    one_class = write(tmp_path / "one.csv", rows(30)[::2])
    both_classes = write(tmp_path / "both.csv", rows(30))
    other = str(tmp_path / "other.toml")
    assert evaluate(run, task=other, data=both_classes).n == 30
    assert evaluate(run, task=other, data=one_class) == evaluate(run, data=one_class)


def test_split_of_a_file_is_rejected(run: Run, tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.folder), "--data", str(tables / "new.csv"), "--split", "test"]) == 1
    assert f"split is 'test', but {tables / 'new.csv'} has no splits and is scored whole" in capsys.readouterr().err


def test_folder_or_missing_file_is_rejected(run: Run, tables: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, but task 'task' reads its rows from files"):
        evaluate(run, data=str(tables))
    with pytest.raises(FileNotFoundError, match="give a file of rows to score"):
        evaluate(run, data=str(tables / "none.csv"))


def test_file_needs_no_groups_but_keeps_questions(llama_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", rows(60))
    more = 'group = "customer"\nquestion = "customer"\nmetrics = ["question_match", "accuracy"]\n'
    run = trained(tmp_path, llama_folder, f'train = "train.csv"\n{more}{TEMPLATE}')
    result = evaluate(run, data=write(tmp_path / "new.csv", rows(50)))
    assert (result.metric, result.n) == ("question_match", 50)
    assert result.value == 0  # each customer has one row of either class, and all rows get one answer
    ungrouped = [(text, queue) for text, queue, _ in rows(50)]
    (tmp_path / "task.toml").write_text(f'train = "train.csv"\ngroup = "customer"\n{TEMPLATE}')
    grouped = evaluate(
        run, task=str(tmp_path / "task.toml"), data=write(tmp_path / "ungrouped.csv", ungrouped, HEAD[:2])
    )
    assert grouped.n == 50


def test_functional_rank_scores_every_row_of_a_file(run: Run, tables: Path) -> None:
    [prompt] = load_prompts(run.folder)
    data = str(tables / "new.csv")
    result = functional_rank(prompt, Truncation(ranks=(2,), rows=0, data=data))
    assert (result.full, result.split) == (evaluate(run, data=data), "file")
    with pytest.raises(ValueError, match="is scored whole"):
        functional_rank(prompt, Truncation(ranks=(2,), data=data, split="dev"))


def test_rows_cut_for_a_score_are_counted(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `evaluate` and by rank analysis, as a training does, and as a note on the command line."""
    data = write(tmp_path / "long.csv", [(f"{text} " * 300, *more) for text, *more in rows(3)] + rows(2))
    with pytest.warns(TruncationWarning, match=r"3 of 5 rows were cut to \d+ tokens, as in training"):
        evaluate(run, data=data)
    [prompt] = load_prompts(run.folder)
    with pytest.warns(TruncationWarning, match=r"3 of 5 rows were cut"):
        functional_rank(prompt, Truncation(ranks=(2,), rows=0, data=data))
    assert main(["evaluate", str(run.folder), "--data", data]) == 0
    assert "note: 3 of 5 rows were cut to" in capsys.readouterr().err


def test_every_row_of_a_file_for_a_benchmark_is_scored(tmp_path: Path) -> None:
    head = ("premise", "hypothesis", "label")
    file = write(tmp_path / "rte.csv", [("a", "b", "entailment")] * 3, head)
    splits = load_test_split(TASKS["rte"], file)
    assert splits is not None
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (0, 0, 3)
    assert load_test_split(TASKS["rte"], str(tmp_path)) is None  # the official folder keeps its splits


def images(folder: Path, classes: Sequence[str], count: int) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    return folder


def test_every_image_of_a_folder_is_scored(tmp_path: Path) -> None:
    task = load_task(str(images(tmp_path / "photos", ("cat", "dog"), 20)))
    splits = load_test_split(task, str(images(tmp_path / "more", ("cat",), 3)))
    assert splits is not None
    assert [len(part) for part in (splits.train, splits.dev, splits.test)] == [0, 0, 3]
    write(tmp_path / "list.csv", [("more/cat/0.png", "dog")], ("image", "label"))
    listed = load_test_split(task, str(tmp_path / "list.csv"))
    assert listed is not None
    assert listed.test["label"][:] == ["dog"]


def test_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    """And the given folder is used, not the test folder of the task itself."""
    task = load_task(str(images(tmp_path / "photos", ("cat", "dog"), 20)))
    for part, count in (("train", 4), ("test", 3), ("val", 2)):
        images(tmp_path / "cut" / part, ("cat", "dog"), count)
    for split, count in ((None, 6), ("dev", 4), ("train", 8)):
        splits = load_test_split(task, str(tmp_path / "cut"), split)
        assert splits is not None
        assert len(splits.test) == count
    shutil.rmtree(tmp_path / "cut" / "test")
    with pytest.raises(ValueError, match="has no test rows, only train, dev"):
        load_test_split(task, str(tmp_path / "cut"))


def test_head_is_not_scored_on_other_classes(run: Run, unchecked: None) -> None:
    """Its classes are indices: another order of the same label words would be scored as other labels."""
    from softprompt.evaluation.evaluate import _check_classes

    class WithHead:
        head = object()

    other = dataclasses.replace(run.task, label_words=dict(reversed(run.task.label_words.items())))
    _check_classes(run, WithHead(), run.task)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a head trained for billing, sales, but task 'task' has sales, billing"):
        _check_classes(run, WithHead(), other)  # type: ignore[arg-type]
