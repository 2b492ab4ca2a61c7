"""A killed sweep continues with the same command; each trial is trained once, to the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from softprompt import Interrupted, Progress, sweep
from softprompt.runs import RECORD, run_folders
from softprompt.sweep import SweepResult
from softprompt.training.callbacks import NullCallback

SAME = ("metrics.jsonl", "softprompt.safetensors", "adapter_model.safetensors", "predictions.jsonl")
KILLS: dict[str, Sequence[tuple[str, str, int]]] = {
    "after the first record, before the second": [("replaced", "dpt-0", 1), ("replace", "dpt-1", 1)],
    "in a checkpoint, and between two trials": [("tensors", "random.safetensors", 2), ("replaced", RECORD, 1)],
    "in a step, and before the last record": [("step", "", 6), ("replace", RECORD, 1)],
}
SEARCH_KILLS = [("step", "", 3), ("replaced", RECORD, 2)]
"""In a step, and when a finished run is not yet recorded in the study."""


@pytest.fixture(scope="module")
def files(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sweep.toml` (two trials) and `search.toml` (a study and two trials)."""
    folder = tmp_path_factory.mktemp("sweeps")
    head = f"""
        backbone = "{llama_folder}"
        task = "{ticket_task}"
        dtype = "float32"
        seed = [0, 1]
        training = {{ steps = 4, batch_size = 8, eval_steps = 2 }}
        prompt = {{ length = 4 }}
        [[method]]
        name = "dpt"
        rank = 2
    """
    (folder / "sweep.toml").write_text(head)
    search = (
        "[search]\ntrials = 4\nwarmup = 2\nspace.training.lr = { low = 0.001, high = 1 }\nspace.prompt.rank = [1, 3]"
    )
    (folder / "search.toml").write_text(head.replace("rank = 2", "") + search)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(files: Path) -> SweepResult:
    """The sweep that was never stopped."""
    return sweep(files / "sweep.toml", out=files / "whole")


def run_jobs(jobs: Sequence[dict[str, Any]], folder: Path) -> Counter[str]:
    """How often each folder's run finished, after checking that exactly the intended children were killed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_sweep.py"), folder / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,  # only for a hang: on a busy machine each of many fsyncs may take a second
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == [-signal.SIGKILL if job["kill"] else 0 for job in jobs], done.stderr
    return Counter((folder / "finished.log").read_text().split())


def assert_same(folder: Path, expected: Path) -> None:
    for name in SAME:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), f"{name} of {folder.name}"


def test_sweep_killed_twice_gives_the_same_runs(files: Path, uninterrupted: SweepResult, tmp_path: Path) -> None:
    outs = [tmp_path / f"out-{number}" for number in range(len(KILLS))]
    jobs = [
        {"file": str(files / "sweep.toml"), "out": str(out), "kill": kill}
        for out, kills in zip(outs, KILLS.values(), strict=True)
        for kill in (*kills, None)
    ]
    finished = run_jobs(jobs, tmp_path)
    names = sorted(trial.name for trial in uninterrupted.trials)
    for out, kind in zip(outs, KILLS, strict=True):
        assert sorted(folder.name for folder in run_folders(out)) == names, kind
        for name in names:
            assert_same(out / name, files / "whole" / name)
    # A kill between a run's end and the rename of its record makes only that run finish twice.
    repeated = {folder for folder, times in finished.items() if times > 1}
    assert all(times <= 2 for times in finished.values())
    assert {Path(folder).parent for folder in repeated} <= {outs[2]}, finished
    assert len(finished) == len(names) * len(outs)
    assert len(repeated) == 1


def test_search_killed_twice_gives_the_same_result(files: Path, tmp_path: Path) -> None:
    uninterrupted = sweep(files / "search.toml", out=tmp_path / "whole")
    out = tmp_path / "out"
    jobs = [{"file": str(files / "search.toml"), "out": str(out), "kill": kill} for kill in SEARCH_KILLS]
    finished = run_jobs(jobs, tmp_path)
    assert list(finished.values()) == [1, 1], finished
    [study] = (out / "search").iterdir()
    with (study / "study.journal").open("a") as journal:
        journal.write('{"op_code":4,"wor')  # as a kill during a write leaves it
    ends = {Path(folder): (Path(folder) / RECORD).read_bytes() for folder in finished}
    sweep(files / "search.toml", out=out)
    assert {folder: (folder / RECORD).read_bytes() for folder in ends} == ends, "a finished run was trained again"
    repeated = sweep(files / "search.toml", out=out)
    assert [trial.state for trial in repeated.trials] == ["skipped", "skipped"]
    [study_result], [expected] = repeated.searches, uninterrupted.searches
    assert (study_result.values, study_result.dev) == (expected.values, expected.dev)
    assert [trial.name for trial in study_result.trials] == [trial.name for trial in expected.trials]
    assert [trial.state.replace("done", "skipped") for trial in expected.trials] == [
        trial.state for trial in study_result.trials
    ]
    for trial in uninterrupted.trials:
        assert_same(out / trial.name, trial.folder)
    best = max((trial for trial in study_result.trials if trial.results), key=lambda trial: trial.results["dev"])
    assert study_result.dev == best.results["dev"]
    assert study_result.values is not None
    assert study_result.values["training.lr"] == best.experiment.training.lr


def test_ctrl_c_says_how_to_continue_the_sweep(
    files: Path, uninterrupted: SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: object, progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(NullCallback, "on_step", step)
    with pytest.raises(Interrupted, match=r"^stopped after step 3 of 4; the same sweep command continues from there$"):
        sweep(files / "sweep.toml", out=tmp_path)
    monkeypatch.undo()
    assert len(run_folders(tmp_path)) == 1
    assert [trial.state for trial in sweep(files / "sweep.toml", out=tmp_path).trials] == ["done"] * 2
    for trial in uninterrupted.trials:
        assert_same(tmp_path / trial.name, trial.folder)


@pytest.mark.parametrize("damage", ["no JSON", "another experiment"])
def test_damaged_run_fails_alone(damage: str, files: Path, uninterrupted: SweepResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(files / "whole", out)
    intact, broken = (trial.name for trial in uninterrupted.trials)
    record = {"no JSON": "{", "another experiment": (out / intact / RECORD).read_text()}[damage]
    (out / broken / RECORD).write_text(record)
    result = sweep(files / "sweep.toml", out=out)
    assert [trial.state for trial in result.trials] == ["skipped", "failed"]
    [failed] = result.failed
    assert failed.name == broken
    messages = {
        "no JSON": "is not readable as JSON",
        "another experiment": "holds a different experiment than its name says",
    }
    assert messages[damage] in failed.problem
    assert (out / broken / RECORD).read_text() == record
