"""Two processes that share each batch train what one trains, and whatever befalls one of them ends both."""

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

LABELS_OF = {"candidates": 0.0, "both": 0.5, "vocabulary": 1.0}
FAULTS = ("kill", "raise", "stop")
HOW = pytest.mark.parametrize("how", ["2", "sharded"])


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=6, rank=2),
        training=TrainingConfig(steps=6, batch_size=8, eval_steps=2, lr=0.1),
        dtype="auto",
    )


def writing(folder: Path) -> Path:
    """A task whose answers are texts, so that every row may end at another token."""
    lines = [f"{' '.join(['abcdef'[row % 6]] * (2 + row % 7))},{'abcdef'[row % 6]}" for row in range(60)]
    (folder / "said.csv").write_text("\n".join(["text,said", *lines]))
    file = folder / "said.toml"
    file.write_text('train = "said.csv"\ntemplate = "Ticket: {text}\\nQueue:"\ntarget = "said"\n')
    return file


class Ended:
    """What the processes of all jobs left."""

    def __init__(self, out: Path, codes: dict[str, list[int]]) -> None:
        self.out, self.codes = out, codes

    def run(self, name: str) -> Run:
        return open_run(self.out / name)

    def errors(self, name: str) -> list[str]:
        files = sorted(self.out.glob(f"{name}-?.json"))
        return [json.loads(file.read_text()) for file in files]

    def said(self, name: str, stream: str) -> list[str]:
        return [file.read_text() for file in sorted(self.out.glob(f"{name}-?.{stream}"))]


@pytest.fixture(scope="module")
def ended(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Every job of this file, done in one go: what is slow is imported once."""
    out = tmp_path_factory.mktemp("processes")
    whole = experiment.to_json()
    drawing = experiment.replace(prompt=METHODS["adept"](length=4, width=3, dropout=0.3)).to_json()
    jobs: list[dict[str, Any]] = []
    for objective in LABELS_OF:
        # 84 rows in batches of 83: every other batch has one row, and one process has none of it.
        settings = TrainingConfig(
            steps=4,
            batch_size=83,
            eval_steps=2,
            lr=0.1,
            vocabulary_weight=LABELS_OF[objective],
            gradient_accumulation_steps=2,
            zero_shot=True,
        )
        # And of odd numbers of rows to score, one process has one more.
        settings = dataclasses.replace(settings, dev_rows=11, test_rows=23)
        parted = experiment.replace(training=settings).to_json()
        jobs += [{"name": f"{objective}-{count}", "count": count, "experiment": parted} for count in (1, 2)]
        sharded = experiment.replace(training=dataclasses.replace(settings, shard=True)).to_json()
        jobs.append({"name": f"{objective}-sharded", "count": 2, "experiment": sharded})
    jobs += [
        {"name": "drawing", "count": 2, "experiment": drawing},
        {"name": "start", "count": 2, "experiment": drawing, "fault": ["start", 1, 0]},
        {"name": "stopped", "count": 2, "experiment": drawing, "fault": ["stop", 1, 3]},
        {"name": "resumed", "count": 2, "resume": "stopped"},
    ]
    jobs += [{"name": kind, "count": 2, "experiment": whole, "fault": [kind, 1, 3]} for kind in ("raise", "kill")]
    written = experiment.replace(
        task=str(writing(out)),
        training=TrainingConfig(steps=2, batch_size=8, eval_steps=2, dev_rows=3, max_new_tokens=9),
    )
    of_parts = written.replace(training=dataclasses.replace(written.training, shard=True))
    jobs += [
        {"name": "written-1", "count": 1, "experiment": written.to_json()},
        {"name": "written-2", "count": 2, "experiment": written.to_json(), "more": ["written-again"]},
        {"name": "written-sharded", "count": 2, "experiment": of_parts.to_json()},
    ]
    sharded = experiment.replace(training=dataclasses.replace(experiment.training, shard=True)).to_json()
    jobs += [{"name": f"{kind}-sharded", "count": 2, "experiment": sharded, "fault": [kind, 1, 3]} for kind in FAULTS]
    jobs += [
        {"name": "resumed-sharded", "count": 2, "resume": "stop-sharded"},
        {"name": "whole-sharded", "count": 2, "experiment": sharded},
        {"name": "full", "count": 2, "experiment": whole, "fault": ["full", 0, 4]},
        {"name": "dtype", "count": 2, "experiment": whole, "fault": ["dtype", 1, 0]},
    ]
    where = ["--backbone", experiment.backbone, "--task", experiment.task, "--out", str(out)]
    settings_ = ["--steps", "2", "--batch-size", "8", "--dtype", "float32", "--show", "1"]
    prompt = ["dpt", "--length", "6", "--rank", "2"]
    jobs += [
        {"name": "cli", "count": 2, "arguments": ["train", *where, *settings_, "--name", "cli", *prompt]},
        {"name": "wrong", "count": 2, "arguments": ["train", *where, "--name", "a/b", *prompt]},
    ]
    parts = ["train", *where, *settings_, "--name", "cli-parts", "--shard", *prompt]
    jobs.append({"name": "cli-parts", "count": 2, "arguments": parts, "fault": ["raise", 1, 2]})
    return Ended(out, done(jobs, out))


def done(jobs: list[dict[str, Any]], out: Path) -> dict[str, list[int]]:
    (out / "jobs.json").write_text(json.dumps(jobs))
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("several.py"), out / "jobs.json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    codes: dict[str, list[int]] = json.loads(ended.stdout)
    return codes


@HOW
@pytest.mark.parametrize("objective", LABELS_OF)
def test_two_train_what_one_trains(ended: Ended, objective: str, how: str) -> None:
    assert ended.codes[f"{objective}-1"] == [0]
    assert ended.codes[f"{objective}-{how}"] == [0, 0], ended.errors(f"{objective}-{how}")
    one, two = ended.run(f"{objective}-1"), ended.run(f"{objective}-{how}")
    ours, theirs = list(two.metrics()), list(one.metrics())
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    assert [line["lr"] for line in ours] == [line["lr"] for line in theirs]
    # The same terms in another order: float32 differs in its last bit or two.
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-6)
    assert [line.get("dev") for line in ours] == [line.get("dev") for line in theirs]
    # Adam divides by the gradient's size, so the order of a sum shows more here than in the loss.
    for name, tensor in load_file(one.folder / "softprompt.safetensors").items():
        torch.testing.assert_close(load_file(two.folder / "softprompt.safetensors")[name], tensor, rtol=0, atol=1e-4)


@HOW
@pytest.mark.parametrize("objective", LABELS_OF)
def test_two_answer_and_score_what_one_does(ended: Ended, objective: str, how: str) -> None:
    one, two = ended.run(f"{objective}-1"), ended.run(f"{objective}-{how}")
    for ours, theirs in zip(two.predictions(), one.predictions(), strict=True):
        # Other rows share a pass in two processes: the last digit of a probability may be another.
        assert ours.pop("probabilities", {}) == pytest.approx(theirs.pop("probabilities", {}), abs=1e-5)
        assert ours == theirs
    assert one.results is not None
    assert two.results is not None
    assert {**two.results, "seconds": 0} == {**one.results, "seconds": 0}


def test_one_that_is_stopped_stops_both_and_both_go_on_to_the_same_bits(ended: Ended) -> None:
    assert ended.codes["drawing"] == [0, 0]
    assert ended.codes["stopped"] == [1, 1]
    for error in ended.errors("stopped"):
        assert error.startswith("Interrupted: stopped after step 3 of 6; go on with: softprompt train --resume ")
    assert ended.codes["resumed"] == [0, 0], ended.errors("resumed")
    for name in ("metrics.jsonl", "softprompt.safetensors", "predictions.jsonl"):
        resumed, whole = ended.run("stopped").folder / name, ended.run("drawing").folder / name
        assert resumed.read_bytes() == whole.read_bytes(), name


def test_first_values_that_come_out_otherwise_elsewhere_are_the_main_ones(ended: Ended) -> None:
    assert ended.codes["start"] == [0, 0], ended.errors("start")
    for name in ("metrics.jsonl", "softprompt.safetensors"):
        assert (ended.run("start").folder / name).read_bytes() == (ended.run("drawing").folder / name).read_bytes()


def test_each_process_draws_for_itself(ended: Ended) -> None:
    states = load_file(ended.run("drawing").folder / "checkpoints/step-000002/random.safetensors")
    assert states.keys() == {"cpu", "cpu.1"}
    first, second = (torch.Generator().set_state(state) for state in states.values())
    # The states themselves hold the seed, which differs even where the numbers drawn do not.
    assert not torch.equal(torch.rand(9, generator=first), torch.rand(9, generator=second))


def test_an_error_in_one_ends_both_with_its_sentence(ended: Ended) -> None:
    assert ended.codes["raise"] == [1, 1]
    assert ended.errors("raise") == [
        "RuntimeError: process 1 of 2 failed: its memory is full",
        "ValueError: its memory is full",
    ]
    assert [line["step"] for line in ended.run("raise").metrics()] == [1, 2]


def test_one_that_is_killed_is_missed_at_once(ended: Ended) -> None:
    assert ended.codes["kill"] == [1, -signal.SIGKILL]
    [error] = ended.errors("kill")
    assert error == (
        "RuntimeError: another process of this training has ended; see what it said, and go on with: "
        "softprompt train --resume RUN"
    )


def test_where_they_meet_in_every_pass_a_missing_one_is_missed_in_the_pass(ended: Ended) -> None:
    missed = ended.errors("kill")
    assert ended.codes["kill-sharded"] == [1, -signal.SIGKILL]
    assert ended.errors("kill-sharded") == missed
    assert ended.codes["raise-sharded"] == [1, 1]
    own = "process 1 of 2 failed: its memory is full"
    assert ended.errors("raise-sharded") == [*missed, f"LocalFailure: {own}"]
    first, second = ended.said("cli-parts", "err")
    assert missed[0].endswith(first.splitlines()[-1].removeprefix("softprompt: "))
    assert second == f"softprompt: {own}\n"


@pytest.mark.parametrize("name", ["written-2", "written-again", "written-sharded"])
def test_texts_too(ended: Ended, name: str) -> None:
    assert ended.codes["written-2"] == ended.codes["written-sharded"] == [0, 0], ended.errors(name)
    one, two = ended.run("written-1"), ended.run(name)
    for ours, theirs in zip(two.predictions(), one.predictions(), strict=True):
        # Other rows share a pass in two processes: the last digit of a probability may be another.
        assert ours.pop("probabilities", {}) == pytest.approx(theirs.pop("probabilities", {}), abs=1e-5)
        assert ours == theirs
    losses = [[line["loss"] for line in run.metrics()] for run in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_sharded_one_that_is_stopped_goes_on_to_the_same_bits(ended: Ended) -> None:
    assert ended.codes["stop-sharded"] == [1, 1]
    assert ended.codes["resumed-sharded"] == [0, 0], ended.errors("resumed-sharded")
    assert ended.codes["whole-sharded"] == [0, 0], ended.errors("whole-sharded")
    for name in ("metrics.jsonl", "softprompt.safetensors", "predictions.jsonl"):
        resumed, whole = ended.run("stop-sharded").folder / name, ended.run("whole-sharded").folder / name
        assert resumed.read_bytes() == whole.read_bytes(), name


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_where_they_meet_in_every_pass_each_has_as_many_rows(count: int) -> None:
    for rows in (list(range(number)) for number in range(10)):
        given = []
        for index in range(count):
            one = DistributedGroup(cpu=True)
            one.count, one.index, one.sharded = count, index, True
            mine = one.share(rows)
            given.append(one.pad_shard(mine, rows))
            assert given[-1][: len(mine)] == mine
        assert len({len(some) for some in given}) == 1


def test_a_full_disk_ends_both(ended: Ended) -> None:
    assert ended.codes["full"] == [1, 1]
    first, second = ended.errors("full")
    assert "there is no room" in first
    assert second.startswith("RuntimeError: process 0 of 2 failed: ")
    assert second.endswith("there is no room")


def test_other_weights_in_one_process_are_refused_before_there_is_a_run(ended: Ended) -> None:
    sentence = "ValueError: the weights of process 1 are not those of process 0; give each the same files and --dtype"
    assert ended.errors("dtype") == [sentence, sentence]
    assert not (ended.out / "dtype").exists()


def test_the_main_process_alone_speaks(ended: Ended) -> None:
    assert ended.codes["cli"] == [0, 0]
    (first, second), (told, silence) = ended.said("cli", "out"), ended.said("cli", "err")
    assert json.loads(first.splitlines()[-1])["steps"] == 2
    assert "kept in" in told
    assert second == silence == ""


def test_an_error_of_both_is_said_once(ended: Ended) -> None:
    assert ended.codes["wrong"] == [1, 1]
    first, second = ended.said("wrong", "err")
    assert first.splitlines()[-1].startswith("softprompt: run name 'a/b' is no plain folder name")
    assert second == ""
    assert ended.said("wrong", "out") == ["", ""]


def test_accelerate_without_mpi_is_not_taken_for_one_process(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softprompt import train

    # What `accelerate launch --cpu --num_processes 2` gives the only process that it starts.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"has started one process where several were asked for.*use: torchrun"):
        train(experiment, out=tmp_path)
    assert not list(tmp_path.iterdir())
