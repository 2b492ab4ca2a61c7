"""Benchmark files that are missing or not the official ones, an unreachable hub, misspelled tasks: one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official_files import lines, many, write_glue, write_superglue

from softprompt.tasks import TASKS
from softprompt.tasks.data.splits import splits
from softprompt.tasks.user import load_task


def test_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach it\nin many lines")

    monkeypatch.setattr("datasets.load_dataset", out_of_reach)
    with pytest.raises(ConnectionError, match=r"^the train rows of cb .*give the official folder .* --data FOLDER$"):
        splits(TASKS["cb"])


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda folder: (folder / "CB" / "val.jsonl").unlink(), "cb", "CB has no val.jsonl or validation.jsonl; give"),
        (
            lambda folder: (folder / "MultiRC" / "train.jsonl").write_text(lines(many("cb", 1))),
            "multirc",
            r"row 1 of .*train.jsonl is not as MultiRC was published \(no 'passage'\)",
        ),
        (
            lambda folder: (folder / "WSC" / "val.jsonl").write_text(
                lines([{**many("wsc", 1)[0], "text": "Nobody at all is in here."}])
            ),
            "wsc",
            r"row 1 of .*val.jsonl is not as WSC was published \(the span .* is not in its text\)",
        ),
        (
            lambda folder: (folder / "CB" / "train.jsonl").write_text(lines(many("rte", 1))),
            "cb",
            "has the label 'not_entailment'.*there are words for entailment, contradiction, neutral",
        ),
    ],
)
def test_unofficial_file_is_refused(tmp_path: Path, change: Callable[[Path], Any], name: str, message: str) -> None:
    folder = write_superglue(tmp_path)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        splits(TASKS[name], str(folder))


def test_glue_cells_are_not_unquoted(tmp_path: Path) -> None:
    folder = write_glue(tmp_path)
    file = folder / "QQP" / "train.tsv"
    full = file.read_text()
    assert '"' in full
    file.write_text(full + "7\t8\t9\tcut short\n")
    assert len(splits(TASKS["qqp"], str(folder)).train) == 18
    file.write_text(full + "7\t8\t9\ta\tb\t1\tone too many\n")
    with pytest.raises(ValueError, match=r"row 19 of .*train.tsv has 7 cells, but there are 6 columns"):
        splits(TASKS["qqp"], str(folder))
    other = folder / "SST-2" / "train.tsv"
    other.write_text(other.read_text() + "no label\n")
    with pytest.raises(ValueError, match=r"row 19 of .*train.tsv has 1 cells"):
        splits(TASKS["sst2"], str(folder))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cbb", "unknown task 'cbb'; did you mean 'cb'"),
        ("multi_rc", "did you mean 'multirc'"),
        ("wsc-positive", "did you mean 'wsc-positives'"),
        ("cb:dtp", "task 'cb' has no template 'dtp'; did you mean 'dpt'"),
    ],
)
def test_misspelled_task_gets_a_suggestion(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(given)
