"""Unusual cells are refused by row and column if the task reads them, and ignored otherwise."""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from softprompt.cli import main
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate
from softprompt.prompts.plain import Plain
from softprompt.runs import Run
from softprompt.tasks.data.splits import splits
from softprompt.tasks.data.tabular import read_rows
from softprompt.tasks.user import load_task
from softprompt.training.trainer import train

ROWS = [{"text": f"{'ab'[i % 2]} {i}", "queue": ("Billing", "Sales")[i % 2]} for i in range(40)]


def task(folder: Path, name: str) -> str:
    (folder / "task.toml").write_text(
        f'train = "{name}"\ntemplate = "Ticket: {{text}}\\nQueue:"\nlabel = "queue"\n', encoding="utf-8"
    )
    return str(folder / "task.toml")


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder / name)


UNREAD: dict[str, Callable[[int], Any]] = {
    "half a character": lambda i: "\ud83d" if i == 7 else "x",
    "mixed kinds": lambda i: i if i % 7 else "12a",
    "nested in two ways": lambda i: {"tags": ["a"] if i % 2 else "a"},
    "whole numbers of 64 bits": lambda i: 2**63 + i,
    "numbers of any size": lambda i: 10 ** (40 * i),
    "texts and lists": lambda i: "a" if i % 2 else ["a"],
}


@pytest.mark.parametrize("cell", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("name", ["note", "id"])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_unread_json_column_may_hold_anything(tmp_path: Path, cell: Callable[[int], Any], name: str, kind: str) -> None:
    rows = [{**row, name: cell(i)} for i, row in enumerate(ROWS)]
    file = Path(jsonl(tmp_path, rows, f"rows.{kind}"))
    if kind == "json":
        file.write_text(json.dumps(rows))
    full = splits(load_task(task(tmp_path, file.name)))
    assert [len(part) for part in (full.train, full.dev, full.test)] == [28, 4, 8]


def test_unread_integer_may_have_thousands_of_digits(tmp_path: Path) -> None:
    lines = [json.dumps(row)[:-1] + f', "note": {"9" * 5000}}}' for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert len(splits(load_task(task(tmp_path, "rows.jsonl"))).test) == 8


@pytest.mark.parametrize("head", ["text,queue,note,note", "text,queue,,", "text,queue,id,id"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_unread_column_names_may_be_anything(tmp_path: Path, head: str, kind: str) -> None:
    lines = [head, *(f"{row['text']},{row['queue']},1,2" for row in ROWS)]
    (tmp_path / f"rows.{kind}").write_text("\n".join(lines).replace(",", "," if kind == "csv" else "\t"))
    assert len(splits(load_task(task(tmp_path, f"rows.{kind}"))).test) == 8


def test_duplicate_column_name_is_refused_if_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,queue,text\n" + "a,Sales,b\n" * 20)
    with pytest.raises(ValueError, match=r"rows\.csv has two columns named 'text'"):
        splits(load_task(_worded(tmp_path, "rows.csv")))


def _worded(folder: Path, name: str) -> str:
    file = Path(task(folder, name))
    file.write_text(file.read_text() + '[label_words]\nBilling = "bill"\nSales = "sell"\n')
    return str(file)


def test_parquet_of_a_database_is_read(tmp_path: Path) -> None:
    count = len(ROWS)
    columns = {
        "text": pyarrow.array([row["text"] for row in ROWS]),
        "queue": pyarrow.array([row["queue"] for row in ROWS]).dictionary_encode(),
        "blob": pyarrow.array([b"\xff\x00"] * count),
        "price": pyarrow.array([decimal.Decimal("1.50")] * count),
        "at": pyarrow.array([datetime.datetime(2026, 1, 1)] * count, pyarrow.timestamp("ns")),
        "user": pyarrow.array([{"name": "x"}] * count),
        "big": pyarrow.array([2**64 - 1] * count, pyarrow.uint64()),
        "took": pyarrow.array([datetime.timedelta(1)] * count),
        "map": pyarrow.array([[("a", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    table = pyarrow.table([*columns.values(), columns["blob"]], names=[*columns, "blob"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    full = splits(load_task(task(tmp_path, "rows.parquet")))
    assert set(full.train["queue"]) == {"Billing", "Sales"}
    read = read_rows(tmp_path / "rows.parquet", ["price", "at", "big"])
    assert str(read[0]["price"]) == "1.50"
    assert read[0]["big"] == str(2**64 - 1)


@pytest.mark.parametrize("column", ["text", "queue"])
def test_lone_surrogate_in_a_read_column_is_refused(tmp_path: Path, column: str) -> None:
    rows = [dict(row) for row in ROWS]
    rows[7][column] += "\ud83d"
    with pytest.raises(ValueError, match=rf"row 8 of .*rows\.jsonl has half a character \(\\ud83d.* '{column}'"):
        splits(load_task(task(tmp_path, Path(jsonl(tmp_path, rows)).name)))
    assert len(read_rows(Path(jsonl(tmp_path, [{"text": "\ud83d\ude00"}])))) == 1  # both halves are one character


def test_lone_surrogate_in_a_list_of_answers_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "answers": ["fine", "\udc00" if i == 4 else "b"]} for i in range(30)]
    with pytest.raises(ValueError, match=r"row 5 of .* has half a character \(\\udc00"):
        read_rows(Path(jsonl(tmp_path, rows)))


def test_numbers_keep_their_written_form(tmp_path: Path) -> None:
    """Not as floats, of which 1 would be written 1.0 and a large number another one."""
    file = Path(jsonl(tmp_path, [{"a": 1, "b": 2**64}, {"a": 2.5, "b": 3}, {"a": None, "b": -1}]))
    assert read_rows(file).to_list() == [{"a": "1", "b": str(2**64)}, {"a": "2.5", "b": "3"}, {"a": None, "b": "-1"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Run:
    folder = tmp_path_factory.mktemp("unread")
    jsonl(folder, ROWS)
    training = TrainingConfig(steps=1, batch_size=4, eval_steps=1)
    full = Experiment(backbone=str(llama_folder), task=task(folder, "rows.jsonl"), dtype="float32", training=training)
    return train(full.replace(prompt=Plain(length=3)), out=folder / "runs")


def test_evaluate_and_predict_ignore_unread_columns(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "note": UNREAD["mixed kinds"](i), "id": "\ud83d"} for i, row in enumerate(ROWS)]
    file = jsonl(tmp_path, rows)
    assert evaluate(run, data=file).n == 40
    capsys.readouterr()
    # A label is not read in predict, so it may be anything.
    file = jsonl(tmp_path, [{**row, "queue": "\ud83d" if i else 3} for i, row in enumerate(rows)])
    assert main(["predict", str(run.folder), "--input", file]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert main(["evaluate", str(run.folder), "--data", file]) == 1


@pytest.mark.parametrize("text", ["fine \ud83d", "\udfff"])
def test_lone_surrogate_in_a_row_to_predict_is_refused(run: Run, text: str) -> None:
    from softprompt.evaluation.predict import predict

    with pytest.raises(ValueError, match="row 2 has half a character"):
        predict(run, [{"text": "fine"}, {"text": text}])
