"""The rows that `softprompt.predict` accepts, and its error message for anything else."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch

import softprompt
from softprompt.backbones import Backbone
from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate
from softprompt.evaluation.predict import answer, predict
from softprompt.models import attach
from softprompt.prompts import Folded
from softprompt.prompts.plain import Plain
from softprompt.runs import Run
from softprompt.tasks import Task
from softprompt.tasks.data.examples import Example
from softprompt.types import TruncationWarning

TEXTS = ["a fine film", "poor", "the text is fine"]
ROWS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Run:
    folder = tmp_path_factory.mktemp("predict")
    (folder / "rows.csv").write_text("text,label\n" + "fine,good\npoor,bad\n" * 20)
    (folder / "task.toml").write_text('train = "rows.csv"\ntemplate = "Review: {text}\\nVerdict:"\nlabel = "label"\n')
    experiment = Experiment(backbone=str(llama_folder), task=str(folder / "task.toml"), dtype="float32")
    training = TrainingConfig(steps=1, batch_size=4, eval_steps=1)
    return softprompt.train(experiment.replace(prompt=Plain(length=3), training=training), out=folder / "runs")


@pytest.fixture(scope="module")
def backbone(run: Run) -> Backbone:
    return softprompt.load_backbone(run.experiment.backbone, dtype="float32")


ACCEPTED: dict[str, Callable[[], Any]] = {
    "texts": lambda: TEXTS,
    "a tuple of texts": lambda: tuple(TEXTS),
    "texts one by one": lambda: iter(TEXTS),
    "an array of texts": lambda: np.array(TEXTS),
    "a series of texts": lambda: pandas.Series(TEXTS),
    "a data frame": lambda: pandas.DataFrame({"text": TEXTS, "note": [None, 1, "x"]}),
    "a data frame with an index": lambda: pandas.DataFrame({"text": TEXTS}, index=[7, 7, 7]),
    "a dataset": lambda: datasets.Dataset.from_list(ROWS),
    "rows and texts": lambda: [ROWS[0], TEXTS[1], ROWS[2]],
}


@pytest.mark.parametrize("rows", ACCEPTED.values(), ids=ACCEPTED)
def test_predict_accepts_rows_of_other_libraries(run: Run, backbone: Backbone, rows: Callable[[], Any]) -> None:
    assert predict(run, rows(), backbone=backbone) == predict(run, ROWS, backbone=backbone)


@pytest.mark.parametrize("row", [TEXTS[0], ROWS[0]], ids=["one text", "one row"])
def test_predict_accepts_one_row(run: Run, backbone: Backbone, row: Any) -> None:
    [answer] = predict(run, row, backbone=backbone)
    [expected] = predict(run, [ROWS[0]], backbone=backbone)
    assert answer == expected


def test_predict_accepts_a_run_folder(run: Run, backbone: Backbone) -> None:
    expected = predict(run, ROWS, backbone=backbone)
    assert predict(str(run.folder), ROWS, backbone=backbone) == expected == predict(run.folder, ROWS, backbone=backbone)
    assert evaluate(str(run.folder), backbone=backbone) == evaluate(run, backbone=backbone)
    with pytest.raises(FileNotFoundError, match="there is no folder nowhere"):
        predict("nowhere", ROWS)


def test_predict_no_rows_returns_no_answers(run: Run, backbone: Backbone) -> None:
    assert predict(run, [], backbone=backbone) == []
    assert predict(run, pandas.DataFrame({"text": []}), backbone=backbone) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            3,
            "the rows are 3 (int); give a list of rows, each a dict with the column 'text', or a data frame, or a",
        ),
        (None, "the rows are None (NoneType); give a list of rows"),
        (b"fine", "the rows are b'fine' (bytes); give a list of rows"),
        (Path("rows.csv"), "(PosixPath); give a list of rows"),
        (["fine", 3], "row 2 is 3 (int); give a list of rows"),
        ([["fine"]], "row 1 is ['fine'] (list); give a list of rows"),
        ({"text": ["a", "b"]}, "has a list in column 'text'"),
        ({"txt": "a"}, "has no column 'text'"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "has no column 'text'"),
        ([{"text": pandas.NA}], "row 1 has no value in column 'text'"),
        ([{"text": pandas.NaT}], "row 1 has no value in column 'text'"),
        (["fine", ""], "row 2 has no text in any column of the template; give it some or leave the row out"),
        ([{"text": "  \n"}], "row 1 has no text in any column"),
        (pandas.DataFrame({"text": ["a", None]}), "row 2 has no value in column 'text'"),
        (pandas.DataFrame({"text": pandas.array(["a", pandas.NA], dtype="string")}), "row 2 has no value in column"),
    ],
)
def test_predict_rejects_other_types(run: Run, backbone: Backbone, rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(run, rows, backbone=backbone)


def test_predict_rejects_a_file_name(
    run: Run, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.csv").write_text("text\nfine\n")
    monkeypatch.chdir(tmp_path)
    for rows in ("new.csv", ["fine", "new.csv"]):
        with pytest.raises(ValueError, match=r"'new\.csv', is the name of a file; give its rows"):
            predict(run, rows, backbone=backbone)
    assert len(predict(run, {"text": "new.csv"}, backbone=backbone)) == 1
    with pytest.warns(TruncationWarning, match=r"1 of 2 rows were cut to \d+ tokens, as in training"):
        assert len(predict(run, ["fine " * 2000, "fine"], backbone=backbone)) == 2


def test_predict_rejects_texts_for_several_columns(run: Run, backbone: Backbone) -> None:
    task = Task(name="pair", template="{a} {b}", label="y", label_words={"0": "bad", "1": "good"})
    several = Run(run.folder, run.experiment, task, run.record)
    with pytest.raises(ValueError, match=r"row 1 is one text, .*reads several columns; .*columns 'a', 'b'"):
        predict(several, TEXTS, backbone=backbone)


def test_numpy_cell_renders_as_its_number() -> None:
    task = Task(name="one", template="{a}", label="y", label_words={"false": "bad", "true": "good"})
    cells: dict[str, Any] = {"true": np.bool_(True), "1": np.int64(1), "0.5": np.float64(0.5)}
    assert {text: task.render({"a": cell}) for text, cell in cells.items()} == {text: text for text in cells}
    assert task.answer({"y": np.bool_(True)}) == 1


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_row_without_finite_logits_is_refused_and_not_the_first_label(
    name: str, tiny_backbone: Callable[[str], Backbone]
) -> None:
    prompted = attach(tiny_backbone(name), Folded(torch.full((2, 32), torch.nan)))
    examples = [Example((5, 6, 7), (), None, 0, where="row 4 of rows.csv"), Example((9, 6, 7, 8), (), None, 1)]
    labels = Task(name="x", template="{text}", label="label", label_words={"neg": "no", "pos": "yes"})
    text = Task(name="y", template="{text}", target="a", metrics=("exact_match",))
    for task in (labels, text):
        with pytest.raises(ValueError, match=r"row 4 of rows.csv overflows in float32, so it has no answer; use"):
            answer(prompted, task, examples, max_new_tokens=3)
