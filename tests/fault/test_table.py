"""A user's task file and tables: valid ones work, and each invalid one is refused in one sentence."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
from datasets import Dataset

from softprompt.tasks import Task
from softprompt.tasks.data.splits import splits
from softprompt.tasks.data.tabular import read_rows
from softprompt.tasks.user import load_task

TASK = """
train = "train.csv"
template = "Ticket: {text}\\nQueue:"
label = "queue"
"""


def rows(n: int = 40) -> list[dict[str, str]]:
    return [{"text": f"ticket {i}", "queue": ("BILLING", "Sales")[i % 2], "customer": f"c{i % 9}"} for i in range(n)]


def as_csv(table: list[dict[str, str]], delimiter: str = ",") -> str:
    return "\n".join(delimiter.join(line) for line in [list(table[0]), *(list(row.values()) for row in table)]) + "\n"


class Folder:
    """A task's folder: `task()` writes the TOML, `train()` the training file, and gives the path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.train(as_csv(rows()))

    def task(self, text: str = TASK) -> str:
        (self.path / "support.toml").write_text(text, encoding="utf-8")
        return str(self.path / "support.toml")

    def train(self, content: str | bytes, name: str = "train.csv") -> Path:
        (self.path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return self.path / name

    def error(self, text: str = TASK, kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind) as caught:
            splits(load_task(self.task(text)))
        message = str(caught.value)
        assert "\n" not in message
        return message


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# What works


def test_table_makes_a_task(folder: Folder) -> None:
    task = load_task(folder.task())
    assert (task.name, dict(task.label_words), task.metrics) == (
        "support",
        {"BILLING": "billing", "Sales": "sales"},
        ("accuracy", "macro_f1"),
    )
    full = splits(task)
    assert [len(full.train), len(full.dev), len(full.test)] == [28, 4, 8]
    (folder.path / "support.toml").unlink()
    again = Task.from_json(json.loads(json.dumps(task.to_json())))
    assert splits(again).fingerprint == full.fingerprint


def test_every_key_is_read(folder: Folder) -> None:
    folder.train(as_csv(rows(10)), "dev.csv")
    folder.train(as_csv(rows(12)), "test.csv")
    text = f"""{TASK}
name = "tickets"
description = "Which queue?"
dev = "dev.csv"
test = "test.csv"
group = "customer"
max_input_tokens = 64
split_seed = 3
metrics = ["macro_f1"]
[label_words]
Sales = "selling"
BILLING = "paying"
"""
    task = load_task(folder.task(text))
    assert (task.name, task.group, task.max_input_tokens, task.split_seed) == ("tickets", "customer", 64, 3)
    assert task.answers == (" selling", " paying")
    full = splits(task)
    assert [len(full.train), len(full.dev), len(full.test)] == [40, 10, 12]


def test_target_makes_a_generation(folder: Folder) -> None:
    task = load_task(folder.task(TASK.replace("label", "target")))
    assert not task.is_classification
    assert task.metrics == ("exact_match", "token_f1")
    assert splits(task).majority == "BILLING"


def test_data_replaces_train(folder: Folder) -> None:
    (folder.path / "train.csv").unlink()
    other = folder.train(as_csv([{**row, "queue": row["queue"][0]} for row in rows(20)]), "other.csv")
    task = load_task(folder.task(), str(other))
    assert list(task.label_words) == ["B", "S"]
    assert len(splits(task).train) == 14
    assert splits(task, data=str(other)).fingerprint == splits(task).fingerprint


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "json lines", "parquet"])
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, kind: str, packed: str) -> None:
    table = [*rows(3), {"text": "007, \u2028NA", "queue": "null", "customer": "é"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in table)
    if kind == "parquet":
        Dataset.from_list(table).to_parquet(tmp_path / "raw")
        content = (tmp_path / "raw").read_bytes()
    else:
        quoted = [{**row, "text": f'"{row["text"]}"'} for row in table]
        built = {"json": json.dumps(table), "json lines": lines, "jsonl": lines, "csv": as_csv(quoted)}
        content = built.get(kind, as_csv(table, "\t")).encode()
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packed]
    path = tmp_path / f"rows.{kind.split()[0]}{packed}"
    path.write_bytes(pack(content))
    assert read_rows(path).to_list() == table


def test_csv_cell_is_unchanged_text(folder: Folder) -> None:
    path = folder.train('\ufeffa,b\n"x\n""y""",NA\n007,\n')
    assert read_rows(path).to_list() == [{"a": 'x\n"y"', "b": "NA"}, {"a": "007", "b": ""}]


def test_label_without_rows_is_a_warning(folder: Folder) -> None:
    label_words = '[label_words]\nBILLING = "billing"\nSales = "sales"\nLEGAL = "legal"\n'
    assert splits(load_task(folder.task(TASK + label_words))).warnings == (
        "no training row of task 'support' has the label 'LEGAL'",
    )


# The task's file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TASK + "labl = 1", "unknown key 'labl'; did you mean 'label'?"),
        (TASK + "name = support", "is not TOML: Invalid value (at line 5,"),
        (TASK + "max_input_tokens = '9'", "max_input_tokens in"),
        (TASK + "metrics = [1]", "metrics in"),
        (TASK + "metrics = ['acuracy']", "unknown metric 'acuracy' of task 'support'; did you mean 'accuracy'?"),
        (TASK + "group = 'customr'", "has no column 'customr'"),
        (TASK + "target = 'text'", "has both of label and target"),
        (TASK.replace('label = "queue"', ""), "has neither of label and target"),
        (TASK.replace("train =", "dev ="), "has no 'train'; add the line train"),
        (TASK.replace("template =", "description ="), "has no 'template'"),
        (TASK.replace('"queue"', '"que"'), "has no column 'que' for the label; it has 'text', 'queue', 'customer'"),
        (TASK.replace("{text}", "{text} {queue}"), "has the column 'queue', which is the answer; take it out"),
        (TASK.replace("{text}", "{txt}"), "has no column 'txt', which task 'support' reads; it has 'text', 'queue'"),
        (TASK.replace("{text}", "{text.x}"), "has no column 'text.x', which task 'support' reads; it has 'text',"),
        (
            TASK + '[label_words]\nBILLING = "pay"\nSales = "Pay"',
            "labels 'BILLING' and 'Sales' of task 'support' have the same",
        ),
        (TASK + '[label_words]\nBILLING = "pay"\nLEGAL = "law"', "row 2 of"),
        (
            TASK + '[label_words]\nBILLING = "pay"\nmax_input_tokens = 9',
            "move max_input_tokens above the line [label_words]",
        ),
        (TASK + '[label_words]\nBILLING = "pay"\nSales = 3', "the word for label 'Sales'"),
        (TASK + '[label_words]\nBILLING = "pay"', "has only the labels ['BILLING']"),
    ],
)
def test_invalid_task_file_is_refused(folder: Folder, text: str, said: str) -> None:
    assert said in folder.error(text)


def test_label_without_word_names_file_row_and_column(folder: Folder) -> None:
    message = folder.error(TASK + '[label_words]\nBILLING = "pay"\nLEGAL = "law"')
    assert f"row 2 of {folder.path / 'train.csv'} has the label 'Sales' in column 'queue', which has no word" in message


def test_missing_files_are_named(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.toml"):
        load_task(str(folder.path / "none.toml"))
    (folder.path / "train.csv").unlink()
    assert "there is no file" in folder.error(kind=FileNotFoundError)


def test_unknown_task_name_is_refused(folder: Folder) -> None:
    with pytest.raises(ValueError, match="unknown task 'sentimnt'; did you mean 'sentiment'"):
        load_task("sentimnt")
    with pytest.raises(ValueError, match=r"describe it in a \.toml file"):
        load_task(str(folder.path / "train.csv"))
    (folder.path / "latin.toml").write_bytes("name = 'é'".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        load_task(str(folder.path / "latin.toml"))


# The rows' file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no rows"),
        ("text,queue\n", "has no rows"),
        ("text,queue\na,B\n\nc,D\n", "row 2 of {} is empty"),
        ("text,queue\na,B\n,\n", "row 2 of {} is empty"),
        ("text,queue\na,B\nc,\n", "row 2 of {} has no label in column 'queue'"),
        ("text,queue\na,B\n ,D\n", "row 2 of {} has no text in any column of the template"),
        ("text,queue\na,B\nc\n", "row 2 of {} has 1 cells, but there are 2 columns"),
        ("text,queue\na,b,B\n", "row 1 of {} has 3 cells"),
        ("text,text\na,B\n", "column 2 ('text') of {} has the name of an earlier one"),
        ("text,\na,B\n", "column 2 ('') of {} has no name"),
        ('text,queue\n"a" b,B\n', "line 2 of {} cannot be read"),
        ('text,queue\n"a,B\nc,D\n', "line 3 of {} cannot be read"),
        ("text,queue\na,B\nc,B\n", "all rows of {} have the label 'B'"),
        ("text,queue\nd\u00e9,B\n".encode("latin-1"), "line 2 of {} has the byte 0xe9, which is not UTF-8"),
        ("text,queue\na,B\n".encode("utf-16"), "is UTF-16 text"),
        (b"text,queue\na,B\nc\0,D\n", "line 3 of {} has a zero byte"),
        ('{"text": "a", "queue": "B"}\n', "{} is named .csv but contains JSON"),
        ('[\n{"text": "a", "queue": "B"}\n]', "{} is named .csv but contains JSON"),
        (b"PAR1....", "{} is named .csv but contains Parquet data"),
        (gzip.compress(b"text,queue\na,B\n", mtime=0), "{} is named .csv but contains gzip data"),
        (b"PK\x03\x04....", "{} is named .csv but contains a zip or Excel data"),
    ],
)
def test_invalid_csv_is_refused(folder: Folder, content: str | bytes, said: str) -> None:
    path = folder.train(content)
    assert said.format(path) in folder.error()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.jsonl", "text,queue\na,B\n", "row 1 of {} is not JSON"),
        ("train.jsonl", '{"text": "a", "queue": "B"}\n\n{"text": "b", "queue": "C"}', "row 2 of {} is empty"),
        ("train.jsonl", '{"text": "a", "queue": "B"}\n{}', "row 2 of {} is empty"),
        ("train.jsonl", '{"text": "a", "queue": "B"}\n[1]', "row 2 of {} is a list"),
        ("train.jsonl", '{"text": "a", "queue": "B"}\n{"text": "b"}', "row 2 of {} has no value in column 'queue'"),
        ("train.jsonl", '{"text": "a", "queue": 1}\n{"text": "b", "queue": NaN}', "row 2 of {} has no value in column"),
        ("train.jsonl", '{"text": "a", "queue": 1}\n{"text": "b", "queue": "x"}', "column 'queue' of {} mixes kinds"),
        ("train.jsonl", '{"text": ["a"], "queue": 1}\n{"text": ["b"], "queue": 2}', "row 1 of {} has a list in column"),
        ("train.jsonl", "", "has no rows"),
        ("train.json", '[{"text": "a",\n"queue": "B"},]', "line 2 of {} is not JSON"),
        ("train.json", "[]", "has no rows"),
        ("train.parquet", "text,queue\na,B\n", "{} is named .parquet but contains no Parquet data"),
        ("train.parquet", b"PAR1 and then nothing", "{} is not a complete Parquet file"),
        ("train.csv.gz", "text,queue\na,B\n", "{} is not a complete .gz file"),
        ("train.csv.gz", gzip.compress(b"text,queue\na,B\n" * 99, mtime=0)[:-9], "{} is not a complete .gz file"),
        ("train.csv.bz2", bz2.compress(b"text,queue\na,B\n")[:-9], "{} is not a complete .bz2 file"),
        ("train.csv.xz", b"nothing", "{} is not a complete .xz file"),
        ("train.tsv", 'text\tqueue\n"a\tB\nc"\tD\n', "row 1 of {} has a quotation mark that runs over the line's end"),
        ("train.xlsx", b"PK", "{} ends in '.xlsx', which is not read"),
        ("train", "text", "{} ends in 'nothing', which is not read"),
    ],
)
def test_invalid_file_is_refused(folder: Folder, name: str, content: str | bytes, said: str) -> None:
    path = folder.train(content, name)
    assert said.format(path) in folder.error(TASK.replace("train.csv", name))


def test_one_class_in_training_is_refused(folder: Folder) -> None:
    folder.train("text,queue\n" + "a,B\n" * 30)
    message = folder.error(TASK + '[label_words]\nB = "b"\nC = "c"')
    assert "rows of task 'support' have the label 'B'" in message


def test_too_few_rows_to_split_are_refused(folder: Folder) -> None:
    folder.train(as_csv(rows(4)))
    assert "4 rows of task 'support' are too few to split into dev, test, train" in folder.error()
    folder.train(as_csv([{**row, "customer": "c"} for row in rows()]))
    assert "1 groups of task 'support' are too few" in folder.error(TASK + 'group = "customer"')


def test_faulty_file_among_several_is_named(folder: Folder) -> None:
    dev = folder.train("text,queue\na,BILLING\nb,LEGAL\n", "dev.csv")
    assert f"row 2 of {dev} has the label 'LEGAL'" in folder.error(TASK + 'dev = "dev.csv"')


def test_whole_floats_beside_integers_are_the_same_labels(folder: Folder) -> None:
    lines = [{"text": f"ticket {n}", "queue": n % 2 if n % 3 else float(n % 2)} for n in range(40)]
    folder.train("\n".join(map(json.dumps, lines)), "train.jsonl")
    assert load_task(folder.task(TASK.replace("train.csv", "train.jsonl"))).label_words == {"0": "0", "1": "1"}
