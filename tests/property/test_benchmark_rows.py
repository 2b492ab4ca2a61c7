"""SuperGLUE and GLUE: official files and hub give the same rows."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from official_files import DIAGNOSTIC, GLUE, SUPERGLUE, Rows, folder_of, lines, many, write_superglue

from softprompt.tasks import READERS, TASKS
from softprompt.tasks.data.splits import splits

HUB_LABELS: dict[str, list[Any]] = {
    "boolq": [False, True],
    "cb": ["entailment", "contradiction", "neutral"],
    "rte": ["entailment", "not_entailment"],
    "wic": [False, True],
    "wsc": [False, True],
    "axb": ["entailment", "not_entailment"],
    "axg": ["entailment", "not_entailment"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "glue-rte": ["entailment", "not_entailment"],
    **{name: ["0", "1"] for name in ("sst2", "cola", "mrpc", "qqp")},
}
"""What the Hub's label n means."""


def as_on_hub(name: str, rows: Rows) -> Rows:
    """The same rows with the Hub's columns and integer labels."""
    if name == "multirc":
        return [
            {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
                "label": answer["label"],
            }
            for row in rows
            for question in row["passage"]["questions"]
            for answer in question["answers"]
        ]
    if name == "record":
        return [
            {
                "passage": row["passage"]["text"],
                "query": query["query"],
                "entities": ["Bo", "Ann Lee", "Ann"] if "Ann" in query["query"] else query["on_hub"],
                "answers": sorted({answer["text"] for answer in query["answers"]}, reverse=True),
                "idx": {"passage": row["idx"], "query": query["idx"]},
            }
            for row in rows
            for query in row["qas"]
        ]
    names = {
        "mrpc": {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label"},
        "qqp": {"is_duplicate": "label"},
        "mnli": {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
        "stsb": {"score": "label"},
    }.get(name, {})
    table = [{names.get(key, key): value for key, value in {**row, **row.get("target", {})}.items()} for row in rows]
    known = HUB_LABELS.get(name)
    for row in table:
        row["label"] = known.index(row["label"]) if known else float(row["label"]) if name == "stsb" else row["label"]
        row.pop("target", None)
    return table


@pytest.mark.parametrize("name", [*SUPERGLUE, *GLUE])
def test_benchmark_folder_and_task_folder_give_equal_rows(name: str, superglue: Path, glue: Path) -> None:
    folder = folder_of(name, superglue, glue)
    full = splits(TASKS[name], str(folder))
    direct = splits(TASKS[name], str(folder / {**SUPERGLUE, **GLUE}[name]))
    assert direct.fingerprint == full.fingerprint
    each = {"multirc": 5, "wsc-positives": 2}.get(name, 3)
    assert len(full.dev) + len(full.test) == each * (6 if name in DIAGNOSTIC else 8)
    assert len(full.train) == (0 if name in DIAGNOSTIC else each * 6)
    assert not [warning for warning in full.warnings if "of a training row" not in warning]


def test_validation_file_may_have_two_names(tmp_path: Path, superglue: Path) -> None:
    other = write_superglue(tmp_path, validation="validation.jsonl")
    assert splits(TASKS["cb"], str(other)).fingerprint == splits(TASKS["cb"], str(superglue)).fingerprint


@pytest.mark.parametrize("name", [name for name in [*SUPERGLUE, *GLUE] if name not in ("boolq", "wsc-positives")])
def test_hub_and_folder_give_equal_rows(
    name: str, superglue: Path, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    def load_dataset(repository: str, config: str, split: str) -> Dataset:
        requests.append((repository, config, split))
        copies = 6 if split in ("train", "test") else 8
        return Dataset.from_list(as_on_hub(name, many(name, copies)))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert splits(TASKS[name]).fingerprint == splits(TASKS[name], str(folder_of(name, superglue, glue))).fingerprint
    repository = "aps/super_glue" if name in SUPERGLUE else "nyu-mll/glue"
    asked_splits = {"axb": ["test"], "axg": ["test"], "mnli": ["train", "validation_matched"]}
    expected = asked_splits.get(name, ["train", "validation"])
    assert requests == [(repository, name.removeprefix("glue-"), split) for split in expected]


def test_data_file_replaces_the_training_rows(tmp_path: Path, superglue: Path, monkeypatch: Any) -> None:
    reader = READERS["cb"]
    monkeypatch.setitem(READERS, "cb", lambda task, folder: reader(task, folder or superglue))
    (tmp_path / "own.jsonl").write_text(lines(many("cb", 2)))
    full = splits(TASKS["cb"], str(tmp_path / "own.jsonl"))
    assert (len(full.train), len(full.dev) + len(full.test)) == (6, 24)
