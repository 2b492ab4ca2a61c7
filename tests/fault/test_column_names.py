"""Any column name works in a template, and numbers and booleans work as labels."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from softprompt.tasks import Task
from softprompt.tasks.data.splits import splits
from softprompt.tasks.user import load_task

NAMES = ["user.name", "a:b", "Customer Text", "col[0]", "what!", "a!r", "x:>9", " spaced ", "größe", "%s", "0", "a-b"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_column_of_any_name_can_be_a_field(tmp_path: Path, name: str, kind: str) -> None:
    rows = [{name: f"text {i}", "y": "ab"[i % 2], "user": "other", "a": "other"} for i in range(40)]
    if kind == "csv":
        with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "task.toml").write_text(
        f'train = "rows.{kind}"\ntemplate = "Say: {{{name}}}"\nlabel = "y"\n', encoding="utf-8"
    )
    task = load_task(str(tmp_path / "task.toml"))
    assert task.render(splits(task).train[0]).startswith("Say: text ")


@pytest.mark.parametrize("field", ["text!r", "text:>9", "text[0]", "text.upper", " text "])
def test_format_syntax_is_a_missing_column(tmp_path: Path, field: str) -> None:
    (tmp_path / "rows.csv").write_text("text,y\n" + "fine,a\npoor,b\n" * 20)
    (tmp_path / "task.toml").write_text(f'train = "rows.csv"\ntemplate = "Say: {{{field}}}"\nlabel = "y"\n')
    message = f"has no column {field!r}, which task 'task' reads; it has 'text', 'y'; braces hold a column's name"
    with pytest.raises(ValueError, match="braces hold") as caught:
        splits(load_task(str(tmp_path / "task.toml")))
    assert message in str(caught.value)
    task = Task(name="t", template=f"{{{field}}}", label="y", label_words={"a": "a", "b": "b"})
    with pytest.raises(ValueError, match=r"write \{text\}"):
        task.render({"text": "fine"})


LABELS: dict[str, tuple[list[Any], str]] = {
    "floats for whole numbers": ([1.0, 0.0], '0 = "no"\n1 = "yes"\n'),
    "floats as floats": ([1.0, 0.0], '"0.0" = "no"\n"1.0" = "yes"\n'),
    "whole numbers for floats": ([1, 0], '"0.0" = "no"\n"1.0" = "yes"\n'),
    "broken numbers": ([1.5, 0.0], '0 = "no"\n"1.5" = "yes"\n'),
    "booleans": ([True, False], 'false = "no"\ntrue = "yes"\n'),
    "texts": (["1", "0"], '0 = "no"\n1 = "yes"\n'),
    "negative": ([-1.0, 1.0], '1 = "no"\n-1 = "yes"\n'),
}


@pytest.mark.parametrize(("values", "words"), LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_numbers_are_labels(tmp_path: Path, values: list[Any], words: str, kind: str) -> None:
    frame = pandas.DataFrame({"text": [f"t {i}" for i in range(40)], "y": values * 20})
    if kind == "parquet":
        frame.to_parquet(tmp_path / "rows.parquet")
    else:
        frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    (tmp_path / "task.toml").write_text(
        f'train = "rows.{kind}"\ntemplate = "{{text}}"\nlabel = "y"\n[label_words]\n{words}'
    )
    task = load_task(str(tmp_path / "task.toml"))
    assert {task.answer(row) for row in splits(task).train} == {0, 1}
    assert task.golds({"y": values[0]}) == ("yes",)


def test_float_labels_without_words_become_integers(tmp_path: Path) -> None:
    pandas.DataFrame({"text": ["a", "b"] * 20, "y": [1.0, 0.0] * 20}).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "task.toml").write_text('train = "rows.parquet"\ntemplate = "{text}"\nlabel = "y"\n')
    task = load_task(str(tmp_path / "task.toml"))
    assert dict(task.label_words) == {"0": "0", "1": "1"}
    assert {task.answer(row) for row in splits(task).train} == {0, 1}


def test_text_label_is_not_a_number(tmp_path: Path) -> None:
    """In a CSV everything is text: 1.0 there is another label than 1."""
    task = Task(name="t", template="{a}", label="y", label_words={"1": "a", "0": "b"})
    with pytest.raises(ValueError, match=r"row 3 has the label '1\.0' in column 'y', which has no word"):
        task.answer({"y": "1.0"}, "row 3")
    with pytest.raises(ValueError, match="there are words for 1, 0"):
        task.answer({"y": True}, "row 3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("0 = 1", "the word for label '0' in {} is 1; write text in quotation marks"),
        ("true = true", "the word for label 'true' in {} is True; write text in quotation marks"),
        ('1.5 = "a"', 'label with a dot in it in quotation marks, as "1.5" = '),
    ],
)
def test_label_words_must_be_texts(tmp_path: Path, words: str, message: str) -> None:
    (tmp_path / "task.toml").write_text(
        f'train = "r.csv"\ntemplate = "{{text}}"\nlabel = "y"\n[label_words]\n{words}\n'
    )
    with pytest.raises(ValueError, match="label") as caught:
        load_task(str(tmp_path / "task.toml"))
    assert message.format(tmp_path / "task.toml") in str(caught.value)
