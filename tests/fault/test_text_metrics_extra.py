"""Without the extra `text-metrics`: one sentence with the install command, and nothing is trained or written."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from softprompt.cli import main
from softprompt.tasks import Task, score
from softprompt.tasks.data.splits import splits
from softprompt.tasks.user import load_task

INSTALL = "needs the extra `text-metrics`; install it in softprompt's clone with: pip install '\\.\\[text-metrics\\]'"


@pytest.fixture(params=["rouge_l", "chrf", "bleu"])
def metric(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A metric whose package is not installed."""
    find_spec, package = importlib.util.find_spec, {"rouge_l": "rouge_score"}.get(request.param, "sacrebleu")

    def find(name: str, *args: Any) -> Any:
        return None if name == package else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return str(request.param)


def written_task(folder: Path, metrics: str) -> Path:
    lines = "".join(f"a b c {i},word {i}\n" for i in range(40))
    (folder / "rows.csv").write_text(f"text,summary\n{lines}")
    file = folder / "task.toml"
    file.write_text(f'train = "rows.csv"\ntemplate = "{{text}}:"\ntarget = "summary"\nmetrics = [{metrics}]\n')
    return file


def test_splits_name_the_missing_extra(tmp_path: Path, metric: str) -> None:
    task = load_task(str(written_task(tmp_path, f'"exact_match", "{metric}"')))
    with pytest.raises(ModuleNotFoundError, match=f"the metric '{metric}' {INSTALL}"):
        splits(task)


def test_score_names_the_missing_extra(metric: str) -> None:
    task = Task(name="t", template="{a}", target="b", metrics=(metric,))
    with pytest.raises(ModuleNotFoundError, match=INSTALL):
        score(task, ["a"], ["a"], majority=None)


def test_train_stops_before_there_is_a_run(
    tmp_path: Path, metric: str, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, out = written_task(tmp_path, f'"{metric}"'), tmp_path / "runs"
    flags = ["--backbone", str(llama_folder), "--task", str(task), "--steps", "2", "--out", str(out), "plain"]
    assert main(["train", *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"softprompt: the metric '{metric}' needs the extra `text-metrics`")
    assert not list(out.glob("*/*"))


def test_other_metrics_need_no_extra(tmp_path: Path, metric: str) -> None:
    task = load_task(str(written_task(tmp_path, '"exact_match", "token_f1"')))
    assert len(splits(task).train) == 28


def test_train_reports_a_text_metric(tmp_path: Path, llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = written_task(tmp_path, '"rouge_l", "chrf", "bleu", "exact_match"')
    flags = ["--steps", "2", "--eval-steps", "2", "--batch-size", "4", "--max-new-tokens", "8", "--out", str(tmp_path)]
    assert main(["train", "--backbone", str(llama_folder), "--task", str(task), *flags, "plain", "--length", "2"]) == 0
    assert '"metric": "rouge_l"' in capsys.readouterr().out
