"""A row has its number in the user's file, counted from 1, everywhere, also after splitting and sampling."""

import csv
import json
import re
from pathlib import Path

import pytest

from softprompt.cli import main
from softprompt.config import Experiment, TrainingConfig
from softprompt.prompts.plain import Plain
from softprompt.runs import Run
from softprompt.tasks.data.splits import shots, splits
from softprompt.tasks.data.tabular import row_name, row_number
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.user import load_task
from softprompt.training.step import _check_finite
from softprompt.training.trainer import train

ROWS = [(f"ticket {i}", ("Billing", "Sales")[i % 2], f"id-{i}", f"c{i // 2}") for i in range(1, 101)]
HEAD = ("text", "queue", "id", "customer")


def task(folder: Path, more: str = "", head: tuple[str, ...] = HEAD) -> str:
    with (folder / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *ROWS])
    (folder / "task.toml").write_text(
        f'train = "rows.csv"\ntemplate = "Ticket: {{text}}\\nQueue:"\nlabel = "queue"\n{more}'
    )
    return str(folder / "task.toml")


@pytest.mark.parametrize("more", ["", 'group = "customer"\n'], ids=["by class", "by group"])
@pytest.mark.parametrize("few", [0, 3])
def test_row_keeps_its_number(tmp_path: Path, more: str, few: int) -> None:
    loaded = load_task(task(tmp_path, more))
    full = splits(loaded)
    if few:
        full = shots(loaded, full, few, seed=1)
    numbers = []
    for part in (full.train, full.dev, full.test):
        for index, row in enumerate(part):
            numbers.append(row_number(row, index))
            assert row["text"] == f"ticket {numbers[-1]}"
            assert row_name(part, row, index) == f"row {numbers[-1]} of {tmp_path / 'rows.csv'}"
    assert len(set(numbers)) == len(numbers)


def test_row_number_is_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Nor of what a task may read."""
    loaded = load_task(task(tmp_path))
    full = splits(loaded)
    assert not {*loaded.columns} - {"text", "queue"}
    assert full.fingerprint == splits(load_task(task(tmp_path, head=("text", "queue", "key", "customer")))).fingerprint


@pytest.fixture(scope="module", params=["id", "key"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Run:
    folder = tmp_path_factory.mktemp("numbers")
    file = task(folder, head=("text", "queue", request.param, "customer"))
    training = TrainingConfig(steps=1, batch_size=4, eval_steps=1, test_rows=9)
    full = Experiment(backbone=str(llama_folder), task=file, dtype="float32", training=training)
    return train(full.replace(prompt=Plain(length=3)), out=folder / "runs")


def test_prediction_names_its_row(run: Run, tmp_path: Path) -> None:
    lines = run.predictions()
    assert len(lines) == 9
    has_id = "id" in (Path(run.task.files["train"]).read_text().splitlines()[0]).split(",")
    for line in lines:
        _, queue, name, _ = ROWS[line["row"] - 1]
        assert (line["gold"], line["split"]) == (queue, "test")
        assert line["id"] == name if has_id else re.fullmatch("[0-9a-f]{16}", line["id"])
        assert max(line["probabilities"], key=line["probabilities"].get) == line["answer"]
        assert sum(line["probabilities"].values()) == pytest.approx(1)
    assert len({line["id"] for line in lines}) == 9


def test_show_prints_the_numbered_row(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run.folder), "--show", "9"]) == 0
    displayed = re.findall(
        r"- row (\d+): answered .*?'Ticket: ticket (\d+)", capsys.readouterr().err.replace("\n", " ")
    )
    assert len(displayed) == sum(line["answer"] != line["gold"] for line in run.predictions())
    assert all(number == text for number, text in displayed)


def test_predict_numbers_rows_as_errors_do(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert main(["predict", str(run.folder), "--input", str(tmp_path / "rows.jsonl")]) == 0
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


def test_loss_that_is_not_finite_names_rows_of_the_file(tmp_path: Path, tokenizer) -> None:
    loaded = load_task(task(tmp_path))
    table = splits(loaded).test
    examples = encode(loaded, tokenizer, table, 64)[0][:2]
    first, second = (row_number(row, 0) for row in table.select(range(2)))
    with pytest.raises(ValueError, match=rf"on row {first} of .*rows\.csv, row {second} of .*rows\.csv; lower"):
        _check_finite(float("nan"), 1.0, 0.1, 3, examples)
