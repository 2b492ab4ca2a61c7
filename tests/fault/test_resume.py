"""A run that is stopped in any way resumes to the same bits as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import DPT, Experiment, Interrupted, Progress, Run, TrainingConfig, list_runs, open_run, resume, train
from softprompt.cli import main
from softprompt.cli.terminal import Terminal
from softprompt.prompts import METHODS
from softprompt.training.callbacks import NullCallback

KILLS = [
    ("replace", "", 1),  # before there is a run
    ("replaced", "", 1),  # a record and nothing else
    ("replace", "optimizer.safetensors", 1),  # within the first checkpoint
    ("replace", "step-000002", 1),  # its files are complete, its folder is not renamed yet
    ("replaced", "step-000002", 1),
    ("tensors", "prompt.safetensors", 2),  # within the second checkpoint
    ("tensors", "random.safetensors", 3),
    ("step", "", 1),
    ("step", "", 3),
    ("step", "", 6),
    ("replace", "predictions.jsonl", 1),  # after the last step
    ("tensors", "softprompt.safetensors", 1),
    ("replaced", "softprompt.safetensors", 1),
    ("replace", "softprompt.json", 1),  # before the record with the results
    ("replaced", "softprompt.json", 1),
]
SAME = ("metrics.jsonl", "softprompt.safetensors", "adapter_model.safetensors", "predictions.jsonl")


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=6, rank=2),
        training=TrainingConfig(steps=6, batch_size=8, eval_steps=2),
        dtype="float32",
    )


@pytest.fixture(scope="module")
def uninterrupted(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that was never interrupted."""
    return train(experiment, out=tmp_path_factory.mktemp("whole"), name="whole")


def assert_same(run: Run, uninterrupted: Run) -> None:
    for name in SAME:
        assert (run.folder / name).read_bytes() == (uninterrupted.folder / name).read_bytes(), f"{name} of {run.name}"
    assert run.results is not None
    assert uninterrupted.results is not None
    assert {**run.results, "seconds": 0} == {**uninterrupted.results, "seconds": 0}


def killed(experiment: Experiment, kills: list[tuple[str, str, int]], out: Path) -> None:
    """Train `experiment` once per kill, each in a process of its own that `kill -9` ends at that point."""
    (out / "jobs.json").write_text(json.dumps({"experiment": experiment.to_json(), "out": str(out), "kills": kills}))
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, script, out / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-signal.SIGKILL] * len(kills), "a training outlived its kill"


def test_killed_run_resumes_to_the_same_bits(uninterrupted: Run, tmp_path: Path) -> None:
    killed(uninterrupted.experiment, KILLS, tmp_path)
    assert not (tmp_path / "run-0").exists(), "an incomplete run exists"
    assert [run.name for run in list_runs(tmp_path)] == sorted(f"run-{number}" for number in range(1, len(KILLS)))
    assert_same(train(uninterrupted.experiment, out=tmp_path, name="run-0"), uninterrupted)
    for number in range(1, len(KILLS)):
        folder = tmp_path / f"run-{number}"
        if open_run(folder).results is None:
            with (folder / "metrics.jsonl").open("a") as log:
                log.write('{"step": 99, "lo')  # as a kill during a write leaves it
        assert_same(resume(folder), uninterrupted)


def test_killed_run_of_a_deep_prompt_resumes_to_the_same_bits(experiment: Experiment, tmp_path: Path) -> None:
    deep = experiment.replace(depth="deep")
    uninterrupted = train(deep, out=tmp_path, name="whole")
    kills = [("replaced", "step-000002", 1), ("tensors", "prompt.safetensors", 2), ("step", "", 6)]
    killed(deep, kills, tmp_path)
    for number in range(len(kills)):
        assert_same(resume(tmp_path / f"run-{number}"), uninterrupted)


def interrupt_at(at: int) -> Callable[[object, Progress], None]:
    """A callback's `on_step` that sends one Ctrl-C at step `at`."""

    def step(_: object, progress: Progress) -> None:
        if progress.step == at:
            os.kill(os.getpid(), signal.SIGINT)

    return step


@pytest.mark.parametrize("at", [1, 2, 5])
def test_ctrl_c_saves_and_says_how_to_resume(
    at: int, uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NullCallback, "on_step", interrupt_at(at))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Interrupted, match=rf"stopped after step {at} of 6; continue with: softprompt train --resume \S+run$"
    ):
        train(uninterrupted.experiment, out=tmp_path, name="run")
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoints" / f"step-{at:06d}").is_dir()
    assert_same(resume(tmp_path / "run"), uninterrupted)


def test_second_ctrl_c_stops_at_once(uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt_twice(_: object, progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(NullCallback, "on_step", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train(uninterrupted.experiment, out=tmp_path, name="run")
    monkeypatch.undo()
    assert_same(resume(tmp_path / "run"), uninterrupted)


def test_ctrl_c_on_the_command_line_resumes(
    uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Terminal, "on_step", interrupt_at(3))
    settings = ["--dtype", "float32", "--steps", "6", "--batch-size", "8", "--eval-steps", "2"]
    source_flags = [
        "--backbone",
        uninterrupted.experiment.backbone,
        "--task",
        uninterrupted.experiment.task,
        "--out",
        str(tmp_path),
    ]
    prompt = ["dpt", "--length", "6", "--rank", "2"]
    assert main(["train", *source_flags, *settings, "--name", "run", *prompt]) == 1
    monkeypatch.undo()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1] == (
        f"softprompt: stopped after step 3 of 6; continue with: softprompt train --resume {tmp_path / 'run'}"
    )
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 6
    assert_same(open_run(tmp_path / "run"), uninterrupted)


def test_nan_loss_names_step_rows_and_lr(uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = torch.optim.AdamW.step, []

    def step_then_nan(self: torch.optim.AdamW, *args: Any) -> Any:
        result = step(self, *args)
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data[0, 0] = torch.nan
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step_then_nan)
    with pytest.raises(
        ValueError,
        match=r"the loss is nan .* at step 4 with learning rate 0\.018 on (row \d+ of \S+train.csv(, |; lower))+",
    ):
        train(uninterrupted.experiment, out=tmp_path, name="run")
    monkeypatch.undo()
    assert_same(resume(tmp_path / "run"), uninterrupted)


def test_random_draws_continue_after_resume(
    uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = uninterrupted.experiment.replace(prompt=METHODS["adept"](length=4, width=3, dropout=0.3))
    torch.manual_seed(1)
    with_dropout = train(experiment, out=tmp_path, name="dropped")
    monkeypatch.setattr(NullCallback, "on_step", interrupt_at(3))
    torch.manual_seed(2)
    with pytest.raises(Interrupted):
        train(experiment, out=tmp_path, name="stopped")
    monkeypatch.undo()
    torch.manual_seed(3)
    assert_same_losses(resume(tmp_path / "stopped"), with_dropout)
    experiment_without_dropout = experiment.replace(prompt=METHODS["adept"](length=4, width=3, dropout=0.0))
    without_dropout = train(experiment_without_dropout, out=tmp_path, name="kept")
    assert [line["loss"] for line in without_dropout.metrics()] != [line["loss"] for line in with_dropout.metrics()]


def assert_same_losses(run: Run, uninterrupted: Run) -> None:
    for name in ("metrics.jsonl", "softprompt.safetensors"):
        assert (run.folder / name).read_bytes() == (uninterrupted.folder / name).read_bytes(), name


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Run, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted.folder, tmp_path / "done")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "done").rglob("*")}
    assert_same(resume(tmp_path / "done"), uninterrupted)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "done").rglob("*")} == before


def test_resume_refuses_changed_rows_or_weights(
    uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, task = tmp_path / "model", tmp_path / "task"
    shutil.copytree(uninterrupted.experiment.backbone, model)
    shutil.copytree(Path(uninterrupted.experiment.task).parent, task)
    experiment = uninterrupted.experiment.replace(backbone=str(model), task=str(task / "tickets.toml"))
    monkeypatch.setattr(NullCallback, "on_step", interrupt_at(2))
    with pytest.raises(Interrupted):
        train(experiment, out=tmp_path, name="run")
    monkeypatch.undo()
    rows = (task / "train.csv").read_text()
    (task / "train.csv").write_text(rows.replace("Billing", "Sales", 1))
    with pytest.raises(ValueError, match=r"the rows of task tickets are not those .*run was started with"):
        resume(tmp_path / "run")
    (task / "train.csv").write_text(rows)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(ValueError, match=r"the weights of .*model are not those that .*run was started with"):
        resume(tmp_path / "run")
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    assert_same_losses(resume(tmp_path / "run"), uninterrupted)


def test_damaged_checkpoint_or_metrics_is_one_sentence(
    uninterrupted: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NullCallback, "on_step", interrupt_at(4))
    with pytest.raises(Interrupted):
        train(uninterrupted.experiment, out=tmp_path, name="run")
    monkeypatch.undo()
    folder = tmp_path / "run"
    last = max((folder / "checkpoints").iterdir())
    state, metrics = (last / "trainer_state.json").read_text(), (folder / "metrics.jsonl").read_bytes()
    advice = "remove its folder to resume from the checkpoint before it"
    (last / "trainer_state.json").write_text(json.dumps({**json.loads(state), "best": "high"}))
    with pytest.raises(ValueError, match=f"which should be numbers; it is damaged, {advice}"):
        resume(folder)
    (last / "trainer_state.json").write_text(state)
    prompt = (last / "prompt.safetensors").read_bytes()
    (last / "prompt.safetensors").write_bytes(prompt[:20])
    with pytest.raises(ValueError, match=f"prompt.safetensors is not a complete safetensors file .*; {advice}"):
        resume(folder)
    (last / "prompt.safetensors").write_bytes(prompt)
    (folder / "metrics.jsonl").write_bytes(b'{"loss": 1}\n\xff\n' + metrics)
    with pytest.raises(ValueError, match=r"line 1 of .*metrics.jsonl is damaged; take it out"):
        resume(folder)
    (folder / "metrics.jsonl").write_bytes(metrics)
    assert_same_losses(resume(folder), uninterrupted)
