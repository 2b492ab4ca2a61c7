"""SuperGLUE and GLUE: splits share no group, are the recorded ones, and follow the protocol."""

import json
from pathlib import Path

import pytest
from official_files import GLUE, GOLDEN, TRAINED, folder_of

from softprompt.config import Experiment, TrainingConfig
from softprompt.evaluation.evaluate import evaluate, read_splits
from softprompt.prompts.plain import Plain
from softprompt.tasks import READERS, TASKS
from softprompt.tasks.data.splits import SAME_ROWS, splits
from softprompt.tasks.user import load_task
from softprompt.training.trainer import train


@pytest.mark.parametrize("name", [name for name in [*TRAINED, *GLUE] if TASKS[name].group])
def test_dev_and_test_share_no_group(name: str, superglue: Path, glue: Path) -> None:
    task = TASKS[name]
    full = splits(task, str(folder_of(name, superglue, glue)))
    dev, test = set(full.dev[task.group]), set(full.test[task.group])
    assert dev
    assert test
    assert not dev & test


@pytest.mark.parametrize(
    ("name", "column"), [("cb", "premise"), ("multirc", "question_id"), ("wsc", "text"), ("sst2", "sentence")]
)
def test_dev_split_is_the_recorded_one(name: str, column: str, superglue: Path, glue: Path) -> None:
    """On every machine and version: the split is part of the task."""
    full = splits(TASKS[name], str(folder_of(name, superglue, glue)))
    assert list(full.dev[column]) == json.loads((GOLDEN / "splits.json").read_text())[name]


@pytest.mark.parametrize("name", TRAINED)
def test_paper_protocol_shares_dev_and_test(name: str, superglue: Path) -> None:
    halves, full = splits(TASKS[name], str(superglue)), splits(TASKS[name], str(superglue), protocol="paper")
    assert full.shared
    assert not halves.shared
    assert full.dev.to_list() == full.test.to_list()
    assert len(full.test) == len(halves.dev) + len(halves.test)
    assert full.train.to_list() == halves.train.to_list()
    assert full.fingerprint != halves.fingerprint


def test_paper_protocol_needs_a_validation_split(ticket_task: Path, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"has no official validation split, which the protocol paper .* use heldout"):
        splits(load_task(str(ticket_task)), protocol="paper")
    with pytest.raises(ValueError, match="protocol is 'papr'; it must be heldout or paper"):
        Experiment(protocol="papr")  # type: ignore[arg-type]
    assert Experiment.from_json(Experiment(protocol="paper").to_json()).protocol == "paper"


@pytest.mark.parametrize(("balanced", "count"), [(True, 6), (False, 2)])
def test_shots_keep_the_shared_validation_split(superglue: Path, balanced: bool, count: int) -> None:
    few = TrainingConfig(shots=2, shots_balanced=balanced)
    paper = Experiment(task="cb", data=str(superglue), protocol="paper", training=few)
    result = read_splits(paper, TASKS["cb"])
    assert (len(result.train), len(result.dev), result.shared) == (count, 24, True)
    heldout = read_splits(paper.replace(protocol="heldout"), TASKS["cb"])
    assert (len(heldout.train), len(heldout.dev), len(heldout.test), heldout.shared) == (count, count, 12, False)
    assert heldout.train.to_list() == result.train.to_list()


def test_diagnostic_cannot_be_trained(superglue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = READERS["axb"]
    monkeypatch.setitem(READERS, "axb", lambda task, folder: reader(task, folder or superglue))
    with pytest.raises(ValueError, match=r"task 'axb' has no training rows.*softprompt evaluate RUN --task axb"):
        read_splits(Experiment(task="axb", data=str(superglue)), TASKS["axb"])
    with pytest.raises(
        ValueError, match=r"task 'axb' has no training rows for .* to replace; give the official folder"
    ):
        splits(TASKS["axb"], str(superglue / "AX-b" / "AX-b.jsonl"))
    with pytest.raises(ValueError, match="is a folder, but task 'sentiment' reads its rows from files"):
        splits(TASKS["sentiment"], str(superglue))
    with pytest.raises(FileNotFoundError, match="there is no nowhere; give a file of training rows, or"):
        splits(TASKS["axb"], "nowhere")


def test_paper_run_records_that_dev_is_test(superglue: Path, llama_folder: Path, tmp_path: Path) -> None:
    """Under `paper`, on all validation rows however few were asked for; the same run then answers the diagnostics."""
    experiment = Experiment(
        backbone=str(llama_folder),
        task="rte",
        data=str(superglue),
        protocol="paper",
        prompt=Plain(length=2),
        training=TrainingConfig(steps=1, batch_size=4, eval_steps=1, dev_rows=3),
    )
    run = train(experiment, out=tmp_path)
    results = run.results
    assert results is not None
    assert (results["protocol"], results["selection_warning"]) == ("paper", SAME_ROWS)
    assert (results["n_dev"], results["n_test"]) == (24, 24)
    scored = evaluate(run)
    assert results["dev"] == results["test"] == scored.value
    assert scored.warning is not None
    assert SAME_ROWS in scored.warning
    assert SAME_ROWS not in (evaluate(run, split="train").warning or "")
    assert "Selected and reported on the same rows" in (run.folder / "README.md").read_text()
    bias = evaluate(run, task="axg", data=str(superglue))
    assert (bias.metric, bias.n, set(bias.extra_metrics)) == ("accuracy", 18, {"gender_parity"})
    assert evaluate(run, task="axb", data=str(superglue)).metric == "matthews"
    with pytest.raises(ValueError, match="task 'axb' has no dev rows; it can only be scored on its test split"):
        evaluate(run, task="axb", data=str(superglue), split="dev")
    heldout = train(experiment.replace(protocol="heldout"), out=tmp_path)
    assert heldout.results is not None
    assert heldout.results["protocol"] == "heldout"
    assert "selection_warning" not in heldout.results
    assert SAME_ROWS not in (evaluate(heldout).warning or "")
    assert "same rows" not in (heldout.folder / "README.md").read_text()
