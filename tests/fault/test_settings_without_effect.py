"""Settings that nothing would read, paths that a shell has not expanded, and what a run depends on and can change."""

import csv
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from called import call

from softprompt import (
    DPT,
    Backbone,
    Experiment,
    Interrupted,
    Plain,
    Progress,
    Task,
    TrainingConfig,
    load_backbone,
    open_run,
    resume,
    train,
)
from softprompt.analysis.rank import load_prompts
from softprompt.training.callbacks import NullCallback
from softprompt.training.distil import _task

TRAINING = TrainingConfig(steps=2, batch_size=4, eval_steps=2)


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=Plain(length=4),
        training=TRAINING,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def backbone(llama_folder: Path) -> Backbone:
    return load_backbone(str(llama_folder), dtype="float32")


@pytest.fixture(scope="module")
def flags(experiment: Experiment) -> list[str]:
    steps = ["--steps", "2", "--eval-steps", "2", "--batch-size", "4", "--dtype", "float32"]
    return ["--backbone", experiment.backbone, "--task", experiment.task, *steps]


@pytest.mark.parametrize("prompt", [DPT(rank=4), Plain(length=300)])
def test_prompt_beside_a_baseline_is_refused(prompt: Any, experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the method (dpt|plain) is given, but the baseline lora trains no prompt"):
        train(experiment.replace(baseline="lora", prompt=prompt), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_unbalanced_shots_without_shots_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    training = TrainingConfig(steps=2, eval_steps=2, shots_balanced=False)
    with pytest.raises(ValueError, match="shots_balanced is off, but no shots are drawn"):
        train(experiment.replace(training=training), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_vocabulary_weight_without_label_words_is_refused(
    weight: float, experiment: Experiment, ticket_task: Path, tmp_path: Path
) -> None:
    shutil.copy(ticket_task.parent / "train.csv", tmp_path)
    task = tmp_path / "t.toml"
    task.write_text('train = "train.csv"\ntemplate = "Ticket: {text}\\nQueue:"\ntarget = "queue"\n')
    training = TrainingConfig(steps=2, eval_steps=2, vocabulary_weight=weight)
    with pytest.raises(ValueError, match=r"vocabulary_weight is 0\.\d, but task .t. has no label words, so"):
        train(experiment.replace(task=str(task), training=training), out=tmp_path / "runs")


def test_memory_option_cannot_be_turned_off_by_resume(experiment: Experiment, tmp_path: Path) -> None:
    training = TrainingConfig(steps=2, eval_steps=2, gradient_checkpointing=True)
    run = train(experiment.replace(training=training), out=tmp_path)
    said = call("train", "--resume", run.folder, "--no-gradient-checkpointing").sentence
    assert "--no-gradient-checkpointing is given, but run" in said


@pytest.mark.parametrize("as_argument", [True, False])
def test_home_folder_is_expanded_after_an_equals_sign(
    as_argument: bool, experiment: Experiment, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    if as_argument:
        assert call("train", *flags, "--out=~/runs", "--name", "one", "plain", "--length", "4").code == 0
    else:
        train(experiment, out="~/runs", name="one")
    assert open_run(tmp_path / "home/runs/one").results
    rows = tmp_path / "rows.csv"
    rows.write_text("text\naaa\n")
    assert call("predict", "~/runs/one", "--input", rows, "--output=~/answers.jsonl").code == 0
    assert (tmp_path / "home/answers.jsonl").is_file()
    assert os.listdir(tmp_path / "work") == []


def test_predictions_never_replace_their_rows(experiment: Experiment, tmp_path: Path) -> None:
    run = train(experiment, out=tmp_path / "runs")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "aaa", "note": "mine"}\n')
    (tmp_path / "same.jsonl").symlink_to(rows)
    for output in (rows, tmp_path / "same.jsonl"):
        assert "is also what is read" in call("predict", run.folder, "--input", rows, "--output", output).sentence
    assert rows.read_text() == '{"text": "aaa", "note": "mine"}\n'
    said = call("predict", run.folder, "--input", rows, "--output", tmp_path).sentence
    assert "is a folder; give the path of a file" in said


class Stop(NullCallback):
    """Kills the run at its second step, before the first checkpoint."""

    def on_step(self, progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt


def test_changed_init_prompt_is_refused_before_the_first_checkpoint(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    for name, seed in (("first", 0), ("second", 1)):
        train(experiment.replace(seed=seed), out=tmp_path, name=name, backbone=backbone)
    shutil.copytree(tmp_path / "first", tmp_path / "start")
    training = TrainingConfig(steps=6, batch_size=4, eval_steps=6)
    started = experiment.replace(init_prompt=str(tmp_path / "start"), training=training)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(started, out=tmp_path, name="cut", backbone=backbone, callback=Stop())
    shutil.rmtree(tmp_path / "cut/checkpoints", ignore_errors=True)
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "second", tmp_path / "start")
    with pytest.raises(ValueError, match=r"start is not the one that .*cut was started from"):
        resume(tmp_path / "cut", backbone=backbone)


def test_rank_does_not_measure_from_a_changed_init_prompt(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    for name, seed in (("start", 0), ("second", 1)):
        train(experiment.replace(seed=seed), out=tmp_path, name=name, backbone=backbone)
    started = experiment.replace(init_prompt=str(tmp_path / "start"))
    run = train(started, out=tmp_path, name="run", backbone=backbone)
    [measured] = load_prompts(run.folder)
    assert measured.start is not None
    shutil.rmtree(tmp_path / "start")
    shutil.copytree(tmp_path / "second", tmp_path / "start")
    [measured] = load_prompts(run.folder)
    assert measured.start is None
    assert "is not the one that" in measured.start_missing


def test_position_after_a_first_token_that_is_no_special_one_is_told(
    experiment: Experiment, backbone: Backbone, tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    backbone = dataclasses.replace(backbone, tokenizer=tiny_backbone("t5").tokenizer)
    notes: list[str] = []

    class Notes(NullCallback):
        def on_note(self, text: str) -> None:
            notes.append(text)

    train(experiment.replace(prompt_position="after_bos"), out=tmp_path, backbone=backbone, callback=Notes())
    assert any("does not begin texts with a special token" in note for note in notes)


def test_decoder_without_its_head_is_no_encoder(llama_folder: Path, experiment: Experiment, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama_folder)
    transformers.AutoModel.from_pretrained(llama_folder).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="is a LlamaModel, a decoder without its language-model head"):
        train(experiment.replace(backbone=str(tmp_path / "bare")), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_demonstrations_with_windows_line_ends_can_be_resumed(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "queue"])
        table.writerows([[f"{'ab'[number % 2]}\r\n{number}", "xy"[number % 2]] for number in range(60)])
    task = tmp_path / "t.toml"
    task.write_text('train = "train.csv"\ntemplate = "{text}\\nQueue:"\nlabel = "queue"\n')
    training = TrainingConfig(steps=6, batch_size=4, eval_steps=6)
    asked = experiment.replace(task=str(task), demonstrations=4, training=training)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        train(asked, out=tmp_path, name="cut", backbone=backbone, callback=Stop())
    assert "\r\n" in open_run(tmp_path / "cut").context
    assert resume(tmp_path / "cut", backbone=backbone).results


def test_distil_keeps_a_column_named_answer() -> None:
    task = _task(Path("q.csv"), "Q: {question} Draft: {answer} Better:", "")
    assert task.target == "teacher_answer"
    assert _task(Path("q.csv"), "Q: {question}", "").target == "answer"


def test_template_with_the_target_is_refused() -> None:
    with pytest.raises(ValueError, match="has the column 'summary', which is the answer"):
        Task(name="t", template="{text} {summary}", target="summary", metrics=("token_f1",))
