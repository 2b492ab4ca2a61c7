"""Which rows are scored: of a file given to `evaluate` all of them, else those that the run was started with."""

import csv
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softprompt.analysis.rank import Truncation, functional_rank
from softprompt.analysis.rank.subject import subjects
from softprompt.cli import main
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate
from softprompt.prompts.plain import Plain
from softprompt.runs import Run
from softprompt.tasks import TASKS, given_rows, load_task
from softprompt.training.trainer import train

TEMPLATE = 'template = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n'
HEAD = ("text", "queue", "customer")


def rows(count: int, turned: bool = False) -> list[tuple[str, ...]]:
    labels = ("Sales", "Billing") if turned else ("Billing", "Sales")
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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write(folder / "train.csv", rows(60))
    write(folder / "test.csv", rows(20))
    write(folder / "new.csv", rows(50))
    write(folder / "turned.csv", rows(50, turned=True))
    return folder


@pytest.fixture(scope="module", params=["cut", "test file"])
def run(request: pytest.FixtureRequest, place: Path, llama_folder: Path) -> Run:
    more = 'test = "test.csv"\n' if request.param == "test file" else ""
    return trained(place, llama_folder, f'train = "train.csv"\n{more}{TEMPLATE}')


def test_every_row_of_a_given_file_is_scored(run: Run, place: Path) -> None:
    new, turned = (evaluate(run, data=str(place / name)) for name in ("new.csv", "turned.csv"))
    assert new.n == turned.n == 50
    assert new.value + turned.value == pytest.approx(1)


@pytest.mark.parametrize("table", [rows(30)[::2], rows(4), rows(1)], ids=["one class", "four rows", "one row"])
def test_a_file_too_small_to_be_cut_is_scored(run: Run, tmp_path: Path, table: list[tuple[str, ...]]) -> None:
    assert evaluate(run, data=write(tmp_path / "few.csv", table)).n == len(table)


def test_another_task_scores_every_row_among_its_own_labels(run: Run, place: Path, tmp_path: Path) -> None:
    """A file of one class must not make that class the only answer."""
    write(tmp_path / "other.csv", rows(40))
    (tmp_path / "other.toml").write_text('train = "other.csv"\ndev = "other.csv"\n' + TEMPLATE)
    one = write(tmp_path / "one.csv", rows(30)[::2])
    both = write(tmp_path / "both.csv", rows(30))
    other = str(tmp_path / "other.toml")
    assert evaluate(run, task=other, data=both).n == 30
    assert evaluate(run, task=other, data=one) == evaluate(run, data=one)


def test_a_split_of_a_file_is_refused(run: Run, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run.folder), "--data", str(place / "new.csv"), "--split", "test"]) == 1
    assert f"split is 'test', and {place / 'new.csv'} is scored whole" in capsys.readouterr().err


def test_a_folder_or_nothing_is_refused(run: Run, place: Path) -> None:
    with pytest.raises(ValueError, match="is a folder, and task 'task' has its rows in files"):
        evaluate(run, data=str(place))
    with pytest.raises(FileNotFoundError, match="give a file of rows to score"):
        evaluate(run, data=str(place / "none.csv"))


def test_groups_are_not_needed_and_questions_stay_whole(llama_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.csv", rows(60))
    more = 'group = "customer"\nquestion = "customer"\nmetrics = ["question_match", "accuracy"]\n'
    run = trained(tmp_path, llama_folder, f'train = "train.csv"\n{more}{TEMPLATE}')
    found = evaluate(run, data=write(tmp_path / "new.csv", rows(50)))
    assert (found.metric, found.n) == ("question_match", 50)
    assert found.value == 0  # of each customer one row is either, and all get one answer or both are wrong
    alone = [(text, queue) for text, queue, _ in rows(50)]
    (tmp_path / "task.toml").write_text(f'train = "train.csv"\ngroup = "customer"\n{TEMPLATE}')
    grouped = evaluate(run, task=str(tmp_path / "task.toml"), data=write(tmp_path / "alone.csv", alone, HEAD[:2]))
    assert grouped.n == 50


def test_ranks_are_measured_on_every_row_of_a_given_file(run: Run, place: Path) -> None:
    [one] = subjects(run.folder)
    data = str(place / "new.csv")
    found = functional_rank(one, Truncation(ranks=(2,), rows=0, data=data))
    assert (found.full, found.split) == (evaluate(run, data=data), "given")
    with pytest.raises(ValueError, match="is scored whole"):
        functional_rank(one, Truncation(ranks=(2,), data=data, split="dev"))


def test_a_file_for_a_benchmark_task_is_scored_whole(tmp_path: Path) -> None:
    head = ("premise", "hypothesis", "label")
    file = write(tmp_path / "rte.csv", [("a", "b", "entailment")] * 3, head)
    found = given_rows(TASKS["rte"], file)
    assert found is not None
    assert (len(found.train), len(found.dev), len(found.test)) == (0, 0, 3)
    assert given_rows(TASKS["rte"], str(tmp_path)) is None  # the official folder keeps its splits


def images(folder: Path, classes: Sequence[str], count: int) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_images_is_scored_whole(tmp_path: Path) -> None:
    task = load_task(str(images(tmp_path / "photos", ("cat", "dog"), 20)))
    found = given_rows(task, str(images(tmp_path / "more", ("cat",), 3)))
    assert found is not None
    assert [len(part) for part in (found.train, found.dev, found.test)] == [0, 0, 3]
    write(tmp_path / "list.csv", [("more/cat/0.png", "dog")], ("image", "label"))
    listed = given_rows(task, str(tmp_path / "list.csv"))
    assert listed is not None
    assert listed.test["label"][:] == ["dog"]


def test_a_folder_cut_into_splits_keeps_them(tmp_path: Path) -> None:
    """And the test folder of the task itself does not take the place of the one given."""
    task = load_task(str(images(tmp_path / "photos", ("cat", "dog"), 20)))
    for part, count in (("train", 4), ("test", 3), ("val", 2)):
        images(tmp_path / "cut" / part, ("cat", "dog"), count)
    for split, count in ((None, 6), ("dev", 4), ("train", 8)):
        found = given_rows(task, str(tmp_path / "cut"), split)
        assert found is not None
        assert len(found.test) == count
    shutil.rmtree(tmp_path / "cut" / "test")
    with pytest.raises(ValueError, match="has no test rows, it has train, dev"):
        given_rows(task, str(tmp_path / "cut"))


def test_a_head_is_not_scored_on_other_classes(run: Run, unchecked: None) -> None:
    """Its classes are numbers: another order of the same words would be scored as other labels."""
    from softprompt.evaluation.evaluate import _check_classes

    class Headed:
        head = object()

    other = dataclasses.replace(run.task, label_words=dict(reversed(run.task.label_words.items())))
    _check_classes(run, Headed(), run.task)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a head trained for billing, sales, and task 'task' has sales, billing"):
        _check_classes(run, Headed(), other)  # type: ignore[arg-type]
