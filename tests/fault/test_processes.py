"""Two data-parallel processes give the result of one, and a failure of one ends both."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompt import DPT, Experiment, Run, TrainingConfig, open_run
from softprompt.prompts import METHODS
from softprompt.training.distributed import DistributedGroup

VOCABULARY_WEIGHTS = {"candidates": 0.0, "both": 0.5, "vocabulary": 1.0}
FAULTS = ("kill", "raise", "stop")
each_mode = pytest.mark.parametrize("mode", ["2", "sharded"])


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=6, rank=2),
        training=TrainingConfig(steps=6, batch_size=8, eval_steps=2, lr=0.1),
        dtype="auto",
    )


def generation_task(folder: Path) -> Path:
    """A generation task, whose answers differ in length."""
    lines = [f"{' '.join(['abcdef'[row % 6]] * (2 + row % 7))},{'abcdef'[row % 6]}" for row in range(60)]
    (folder / "said.csv").write_text("\n".join(["text,said", *lines]))
    file = folder / "said.toml"
    file.write_text('train = "said.csv"\ntemplate = "Ticket: {text}\\nQueue:"\ntarget = "said"\n')
    return file


class FinishedJobs:
    """The files and exit codes of all jobs' processes."""

    def __init__(self, out: Path, codes: dict[str, list[int]]) -> None:
        self.out, self.codes = out, codes

    def run(self, name: str) -> Run:
        return open_run(self.out / name)

    def errors(self, name: str) -> list[str]:
        files = sorted(self.out.glob(f"{name}-?.json"))
        return [json.loads(file.read_text()) for file in files]

    def output(self, name: str, stream: str) -> list[str]:
        return [file.read_text() for file in sorted(self.out.glob(f"{name}-?.{stream}"))]


@pytest.fixture(scope="module")
def finished_jobs(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> FinishedJobs:
    """All jobs of this file in one process tree, which imports slow packages once."""
    out = tmp_path_factory.mktemp("processes")
    experiment_json = experiment.to_json()
    drawing = experiment.replace(prompt=METHODS["adept"](length=4, width=3, dropout=0.3)).to_json()
    jobs: list[dict[str, Any]] = []
    for objective in VOCABULARY_WEIGHTS:
        # 84 rows in batches of 83: every other batch has one row, so one process has none.
        settings = TrainingConfig(
            steps=4,
            batch_size=83,
            eval_steps=2,
            lr=0.1,
            vocabulary_weight=VOCABULARY_WEIGHTS[objective],
            gradient_accumulation_steps=2,
            zero_shot=True,
        )
        # With odd numbers of rows to score, one process has one more.
        settings = dataclasses.replace(settings, dev_rows=11, test_rows=23)
        accumulated = experiment.replace(training=settings).to_json()
        jobs += [{"name": f"{objective}-{count}", "count": count, "experiment": accumulated} for count in (1, 2)]
        sharded = experiment.replace(training=dataclasses.replace(settings, shard=True)).to_json()
        jobs.append({"name": f"{objective}-sharded", "count": 2, "experiment": sharded})
    jobs += [
        {"name": "drawing", "count": 2, "experiment": drawing},
        {"name": "start", "count": 2, "experiment": drawing, "fault": ["start", 1, 0]},
        {"name": "stopped", "count": 2, "experiment": drawing, "fault": ["stop", 1, 3]},
        {"name": "resumed", "count": 2, "resume": "stopped"},
    ]
    jobs += [
        {"name": kind, "count": 2, "experiment": experiment_json, "fault": [kind, 1, 3]} for kind in ("raise", "kill")
    ]
    generation = experiment.replace(
        task=str(generation_task(out)),
        training=TrainingConfig(steps=2, batch_size=8, eval_steps=2, dev_rows=3, max_new_tokens=9),
    )
    generation_sharded = generation.replace(training=dataclasses.replace(generation.training, shard=True))
    jobs += [
        {"name": "written-1", "count": 1, "experiment": generation.to_json()},
        {"name": "written-2", "count": 2, "experiment": generation.to_json(), "more": ["written-again"]},
        {"name": "written-sharded", "count": 2, "experiment": generation_sharded.to_json()},
    ]
    sharded = experiment.replace(training=dataclasses.replace(experiment.training, shard=True)).to_json()
    jobs += [{"name": f"{kind}-sharded", "count": 2, "experiment": sharded, "fault": [kind, 1, 3]} for kind in FAULTS]
    jobs += [
        {"name": "resumed-sharded", "count": 2, "resume": "stop-sharded"},
        {"name": "whole-sharded", "count": 2, "experiment": sharded},
        {"name": "full", "count": 2, "experiment": experiment_json, "fault": ["full", 0, 4]},
        {"name": "dtype", "count": 2, "experiment": experiment_json, "fault": ["dtype", 1, 0]},
    ]
    source_flags = ["--backbone", experiment.backbone, "--task", experiment.task, "--out", str(out)]
    settings_ = ["--steps", "2", "--batch-size", "8", "--dtype", "float32", "--show", "1"]
    prompt = ["dpt", "--length", "6", "--rank", "2"]
    jobs += [
        {"name": "cli", "count": 2, "arguments": ["train", *source_flags, *settings_, "--name", "cli", *prompt]},
        {"name": "wrong", "count": 2, "arguments": ["train", *source_flags, "--name", "a/b", *prompt]},
    ]
    shard_arguments = ["train", *source_flags, *settings_, "--name", "cli-parts", "--shard", *prompt]
    jobs.append({"name": "cli-parts", "count": 2, "arguments": shard_arguments, "fault": ["raise", 1, 2]})
    return FinishedJobs(out, run_jobs(jobs, out))


def run_jobs(jobs: list[dict[str, Any]], out: Path) -> dict[str, list[int]]:
    (out / "jobs.json").write_text(json.dumps(jobs))
    finished_jobs = subprocess.run(
        [sys.executable, Path(__file__).with_name("multi_process.py"), out / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished_jobs.returncode == 0, finished_jobs.stderr
    codes: dict[str, list[int]] = json.loads(finished_jobs.stdout)
    return codes


@each_mode
@pytest.mark.parametrize("objective", VOCABULARY_WEIGHTS)
def test_two_processes_train_like_one(finished_jobs: FinishedJobs, objective: str, mode: str) -> None:
    assert finished_jobs.codes[f"{objective}-1"] == [0]
    assert finished_jobs.codes[f"{objective}-{mode}"] == [0, 0], finished_jobs.errors(f"{objective}-{mode}")
    single, double = finished_jobs.run(f"{objective}-1"), finished_jobs.run(f"{objective}-{mode}")
    double_lines, single_lines = list(double.metrics()), list(single.metrics())
    assert [line["step"] for line in double_lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in double_lines] == [line["lr"] for line in single_lines]
    # The same terms in another order differ in the last bits of float32.
    assert [line["loss"] for line in double_lines] == pytest.approx([line["loss"] for line in single_lines], rel=1e-6)
    assert [line.get("dev") for line in double_lines] == [line.get("dev") for line in single_lines]
    # Adam divides by the gradient's size, which amplifies rounding here.
    for name, tensor in load_file(single.folder / "softprompt.safetensors").items():
        torch.testing.assert_close(load_file(double.folder / "softprompt.safetensors")[name], tensor, rtol=0, atol=1e-4)


@each_mode
@pytest.mark.parametrize("objective", VOCABULARY_WEIGHTS)
def test_two_processes_predict_and_score_like_one(finished_jobs: FinishedJobs, objective: str, mode: str) -> None:
    single, double = finished_jobs.run(f"{objective}-1"), finished_jobs.run(f"{objective}-{mode}")
    for double_lines, single_lines in zip(double.predictions(), single.predictions(), strict=True):
        # Batches differ between one and two processes, so the last digit of a probability may differ.
        assert double_lines.pop("probabilities", {}) == pytest.approx(single_lines.pop("probabilities", {}), abs=1e-5)
        assert double_lines == single_lines
    assert single.results is not None
    assert double.results is not None
    assert {**double.results, "seconds": 0} == {**single.results, "seconds": 0}


def test_interrupt_in_one_process_stops_both_resumably(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["drawing"] == [0, 0]
    assert finished_jobs.codes["stopped"] == [1, 1]
    for error in finished_jobs.errors("stopped"):
        assert error.startswith("Interrupted: stopped after step 3 of 6; continue with: softprompt train --resume ")
    assert finished_jobs.codes["resumed"] == [0, 0], finished_jobs.errors("resumed")
    for name in ("metrics.jsonl", "softprompt.safetensors", "predictions.jsonl"):
        resumed, experiment_json = (
            finished_jobs.run("stopped").folder / name,
            finished_jobs.run("drawing").folder / name,
        )
        assert resumed.read_bytes() == experiment_json.read_bytes(), name


def test_initial_values_are_the_main_processs(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["start"] == [0, 0], finished_jobs.errors("start")
    for name in ("metrics.jsonl", "softprompt.safetensors"):
        assert (finished_jobs.run("start").folder / name).read_bytes() == (
            finished_jobs.run("drawing").folder / name
        ).read_bytes()


def test_each_process_has_its_own_random_state(finished_jobs: FinishedJobs) -> None:
    states = load_file(finished_jobs.run("drawing").folder / "checkpoints/step-000002/random.safetensors")
    assert states.keys() == {"cpu", "cpu.1"}
    first, second = (torch.Generator().set_state(state) for state in states.values())
    # Compare draws, not states, which also hold the seed.
    assert not torch.equal(torch.rand(9, generator=first), torch.rand(9, generator=second))


def test_error_in_one_process_ends_both(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["raise"] == [1, 1]
    assert finished_jobs.errors("raise") == [
        "RuntimeError: process 1 of 2 failed: its memory is full",
        "ValueError: its memory is full",
    ]
    assert [line["step"] for line in finished_jobs.run("raise").metrics()] == [1, 2]


def test_killed_process_ends_the_other(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["kill"] == [1, -signal.SIGKILL]
    [error] = finished_jobs.errors("kill")
    assert error == (
        "RuntimeError: another process of this training has ended; read its error, and continue with: "
        "softprompt train --resume RUN"
    )


def test_sharded_failure_ends_the_other_in_its_pass(finished_jobs: FinishedJobs) -> None:
    peer_errors = finished_jobs.errors("kill")
    assert finished_jobs.codes["kill-sharded"] == [1, -signal.SIGKILL]
    assert finished_jobs.errors("kill-sharded") == peer_errors
    assert finished_jobs.codes["raise-sharded"] == [1, 1]
    local_error = "process 1 of 2 failed: its memory is full"
    assert finished_jobs.errors("raise-sharded") == [*peer_errors, f"LocalFailure: {local_error}"]
    first, second = finished_jobs.output("cli-parts", "err")
    assert peer_errors[0].endswith(first.splitlines()[-1].removeprefix("softprompt: "))
    assert second == f"softprompt: {local_error}\n"


@pytest.mark.parametrize("name", ["written-2", "written-again", "written-sharded"])
def test_two_processes_generate_like_one(finished_jobs: FinishedJobs, name: str) -> None:
    assert finished_jobs.codes["written-2"] == finished_jobs.codes["written-sharded"] == [0, 0], finished_jobs.errors(
        name
    )
    single, double = finished_jobs.run("written-1"), finished_jobs.run(name)
    for double_lines, single_lines in zip(double.predictions(), single.predictions(), strict=True):
        # Batches differ between one and two processes, so the last digit of a probability may differ.
        assert double_lines.pop("probabilities", {}) == pytest.approx(single_lines.pop("probabilities", {}), abs=1e-5)
        assert double_lines == single_lines
    losses = [[line["loss"] for line in run.metrics()] for run in (double, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_interrupted_sharded_run_resumes_to_the_same_bits(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["stop-sharded"] == [1, 1]
    assert finished_jobs.codes["resumed-sharded"] == [0, 0], finished_jobs.errors("resumed-sharded")
    assert finished_jobs.codes["whole-sharded"] == [0, 0], finished_jobs.errors("whole-sharded")
    for name in ("metrics.jsonl", "softprompt.safetensors", "predictions.jsonl"):
        resumed, experiment_json = (
            finished_jobs.run("stop-sharded").folder / name,
            finished_jobs.run("whole-sharded").folder / name,
        )
        assert resumed.read_bytes() == experiment_json.read_bytes(), name


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sharded_processes_have_equally_many_rows(count: int) -> None:
    for rows in (list(range(number)) for number in range(10)):
        padded = []
        for index in range(count):
            single = DistributedGroup(cpu=True)
            single.world_size, single.rank, single.sharded = count, index, True
            mine = single.share(rows)
            padded.append(single.pad_shard(mine, rows))
            assert padded[-1][: len(mine)] == mine
        assert len({len(padded_rows) for padded_rows in padded}) == 1


def test_full_disk_in_one_process_ends_both(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["full"] == [1, 1]
    first, second = finished_jobs.errors("full")
    assert "there is no room" in first
    assert second.startswith("RuntimeError: process 0 of 2 failed: ")
    assert second.endswith("there is no room")


def test_different_weights_are_refused_before_the_folder(finished_jobs: FinishedJobs) -> None:
    message = "ValueError: the weights of process 1 are not those of process 0; give each the same files and --dtype"
    assert finished_jobs.errors("dtype") == [message, message]
    assert not (finished_jobs.out / "dtype").exists()


def test_only_the_main_process_prints(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["cli"] == [0, 0]
    (first, second), (printed, silence) = finished_jobs.output("cli", "out"), finished_jobs.output("cli", "err")
    assert json.loads(first.splitlines()[-1])["steps"] == 2
    assert "saved in" in printed
    assert second == silence == ""


def test_error_of_both_processes_is_printed_once(finished_jobs: FinishedJobs) -> None:
    assert finished_jobs.codes["wrong"] == [1, 1]
    first, second = finished_jobs.output("wrong", "err")
    assert first.splitlines()[-1].startswith("softprompt: run name 'a/b' is not a plain folder name")
    assert second == ""
    assert finished_jobs.output("wrong", "out") == ["", ""]


def test_accelerate_launch_without_mpi_is_refused(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softprompt import train

    # The environment of the only process that `accelerate launch --cpu --num_processes 2` starts.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"started one process although several were requested.*use: torchrun"):
        train(experiment, out=tmp_path)
    assert not list(tmp_path.iterdir())
