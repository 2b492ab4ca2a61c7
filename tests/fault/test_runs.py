"""A run is used with its own weights, from any folder, with unusual rows, beside damaged runs."""

import csv
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from softprompt import (
    DPT,
    Experiment,
    Progress,
    Run,
    TrainingConfig,
    attach,
    evaluate,
    load_backbone,
    open_run,
    predict,
    train,
)
from softprompt.backbones import Backbone
from softprompt.cli import main
from softprompt.evaluation.predict import input_limit
from softprompt.prompts import METHODS
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.user import load_task
from softprompt.training.callbacks import NullCallback

PROMPT = DPT(length=6, rank=2)
TRAINING = TrainingConfig(steps=2, batch_size=8, eval_steps=2)


@pytest.fixture(scope="module")
def finished(llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    experiment = Experiment(
        backbone=str(llama_folder), task=str(ticket_task), prompt=PROMPT, training=TRAINING, dtype="float32"
    )
    return train(experiment, out=tmp_path_factory.mktemp("runs"), name="whole")


def altered(folder: Path, where: Path, *, by: float) -> Path:
    """A copy of a model in which one weight is larger."""
    other = where / "other-llama"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += by
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_other_backbone_of_equal_width_is_refused(finished: Run, llama_folder: Path, tmp_path: Path) -> None:
    other = altered(llama_folder, tmp_path, by=1e-6)
    backbone, rows = load_backbone(str(other), dtype="float32"), [{"text": "a a"}]
    for call in (
        lambda: finished.prompt(backbone),
        lambda: evaluate(finished, backbone=backbone),
        lambda: predict(finished, rows, backbone=backbone),
    ):
        with pytest.raises(
            ValueError, match=r"the weights of \S+other-llama are not those that run \S+whole was train"
        ):
            call()
    shutil.copy(llama_folder / "model.safetensors", other)  # the folder's name does not matter
    assert predict(finished, rows, backbone=load_backbone(str(other), dtype="float32"))
    for narrower in ("bfloat16", "float16"):
        assert predict(finished, rows, backbone=load_backbone(str(other), dtype=narrower))


@pytest.mark.parametrize("narrower", ["bfloat16", "float16"])
def test_other_backbone_in_a_narrower_dtype_is_refused(
    narrower: str, finished: Run, llama_folder: Path, tmp_path: Path
) -> None:
    other = altered(llama_folder, tmp_path, by=0.1)
    with pytest.raises(ValueError, match=r"the weights of \S+other-llama are not those that run \S+whole was trained"):
        predict(finished, [{"text": "a a"}], backbone=load_backbone(str(other), dtype=narrower))


def test_other_backbone_in_a_wider_dtype_is_refused(finished: Run, llama_folder: Path, tmp_path: Path) -> None:
    half = train(finished.experiment.replace(dtype="bfloat16"), out=tmp_path, name="half")
    assert predict(half, [{"text": "a a"}], backbone=load_backbone(str(llama_folder), dtype="float32"))
    other = altered(llama_folder, tmp_path, by=0.1)
    with pytest.raises(ValueError, match=r"the weights of \S+other-llama are not those that run \S+half was trained"):
        predict(half, [{"text": "a a"}], backbone=load_backbone(str(other), dtype="float32"))


def test_relative_paths_work_from_another_folder(
    finished: Run, llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, elsewhere = tmp_path / "here", tmp_path / "there"
    elsewhere.mkdir()
    shutil.copytree(llama_folder, origin / "model")
    shutil.copytree(ticket_task.parent, origin / "task")
    shutil.copy(origin / "task/train.csv", origin / "rows.csv")
    monkeypatch.chdir(origin)
    relative = finished.experiment.replace(
        backbone="model", task="task/tickets.toml", data="rows.csv", init_prompt=os.path.relpath(finished.folder)
    )
    trained = train(relative, out="runs", name="relative")
    score = evaluate(trained)
    monkeypatch.chdir(elsewhere)
    reopened = open_run("../here/runs/relative")
    assert evaluate(reopened) == score
    recorded = reopened.experiment
    assert (recorded.backbone, recorded.task, recorded.data, recorded.init_prompt) == (
        str(origin / "model"),
        str(origin / "task/tickets.toml"),
        str(origin / "rows.csv"),
        str(finished.folder),
    )


def test_builtin_names_stay_names_beside_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Experiment().with_absolute_paths() == Experiment()
    for name in (Experiment().backbone, "cb", "cb:dpt"):  # folders named like benchmarks
        (tmp_path / name).mkdir()
    for task in ("cb", "cb:dpt"):
        assert Experiment(task=task).with_absolute_paths() == Experiment(task=task)


@pytest.fixture(scope="module")
def long_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of up to 400 words for a model with 256 positions; the cue for the answer is at the end."""
    folder, draw = tmp_path_factory.mktemp("long"), random.Random(0)
    with (folder / "train.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "queue"])
        table.writerows([" ".join(["ab"[row % 2]] * draw.randint(200, 400)), "xy"[row % 2]] for row in range(40))
    file = folder / "long.toml"
    file.write_text('train = "train.csv"\ntemplate = "Ticket: {text}\\nQueue:"\nlabel = "queue"\n')
    return file


@pytest.mark.parametrize(
    ("method", "settings", "max_length"), [("dpt", {"length": 100}, 156), ("dept", {"positions": 50}, 50)]
)
def test_long_rows_are_cut_with_a_note(
    finished: Run, long_task: Path, tmp_path: Path, method: str, settings: dict[str, int], max_length: int
) -> None:
    notes: list[str] = []

    class Listener:
        def on_stage(self, text: str) -> None: ...

        def on_note(self, text: str) -> None:
            notes.append(text)

        def on_step(self, progress: Progress) -> None: ...

    prompt = METHODS[method](rank=2, **settings)
    run = train(finished.experiment.replace(task=str(long_task), prompt=prompt), out=tmp_path, callback=Listener())
    backbone, task = load_backbone(finished.experiment.backbone, dtype="float32"), load_task(str(long_task))
    prompted = run.prompted(backbone)
    longest = max(len(backbone.tokenizer(word, add_special_tokens=False)["input_ids"]) for word in task.answers)
    limit = input_limit(prompted, task, TRAINING)
    assert limit == max_length - longest
    assert [note.endswith(f"train rows were cut to {limit} tokens (--max-input-tokens)") for note in notes].count(
        True
    ) == 1
    rows = [{"text": "a " * 400}]
    [example] = encode(task, backbone.tokenizer, rows, limit, answers=False)[0]
    assert len(example.input_ids) == limit
    assert backbone.tokenizer.decode(example.input_ids).endswith("Queue:")
    assert predict(run, rows, backbone=backbone)[0].label in ("x", "y")
    assert input_limit(attach(backbone), task, TRAINING) == 256 - longest


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (
            255,
            r"a prompt of 255 and an answer of \d tokens leave no room in the 256 positions of \S+; lower the length",
        ),
        (256, r"length is 256, but \S+ has 256 positions; lower it"),
    ],
)
def test_prompt_that_leaves_no_room_is_refused(finished: Run, tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(finished.experiment.replace(prompt=DPT(length=length, rank=2)), out=tmp_path)


def test_offsets_shorter_than_an_answer_are_refused(finished: Run, tmp_path: Path) -> None:
    message = "has offsets for 1 tokens, of which an answer of . leaves none to the input; give it more positions"
    with pytest.raises(ValueError, match=message):
        train(finished.experiment.replace(prompt=METHODS["dept"](length=6, positions=1)), out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "limit"), [("t5", 30), ("roberta_mlm", 28)])
def test_only_an_answer_in_the_input_uses_its_offsets(
    kind: str, limit: int, tiny_backbone: Callable[[str], Backbone], ticket_task: Path
) -> None:
    backbone, config = tiny_backbone(kind), METHODS["dept"](length=6, positions=30)
    prompted = attach(backbone, config.build(backbone.host(), torch.Generator().manual_seed(0)))
    task = load_task(str(ticket_task))
    assert input_limit(prompted, task, TRAINING) == limit
    [example] = encode(task, backbone.tokenizer, [{"text": "a " * 99}], limit, appends_eos=True, answers=False)[0]
    assert len(example.input_ids) == limit
    prompted.score(torch.tensor([example.input_ids]), None, [[5], [6]])


def flags(experiment: Experiment, out: Path) -> list[str]:
    where = ["--backbone", experiment.backbone, "--out", str(out), "--dtype", "float32"]
    return [*where, "--steps", "2", "--batch-size", "8", "dpt", "--length", "6", "--rank", "2"]


def test_square_brackets_in_a_row_are_printed(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "[/b] a [bold red] b [/]"
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "queue"])
        table.writerows([f"{text} {row}", ("[/x]", "[y]")[row % 2]] for row in range(40))
    file = tmp_path / "brackets.toml"
    file.write_text('train = "train.csv"\ntemplate = "{text}:"\nlabel = "queue"\n')
    assert main(["train", "--task", str(file), "--show", "3", *flags(finished.experiment, tmp_path)]) == 0
    captured = capsys.readouterr().err
    assert "rows answered wrongly" in captured
    assert captured.replace("\n", "").count(text) == 3
    assert captured.count(": answered [") == captured.count("], correct is [") == 3


def test_list_names_a_damaged_run_among_others(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a-whole", "b-cut", "c-later", "d-whole"):
        shutil.copytree(finished.folder, tmp_path / name)
    cut, later = tmp_path / "b-cut/softprompt.json", tmp_path / "c-later/softprompt.json"
    cut.write_text(cut.read_text()[:99])
    later.write_text(json.dumps({**json.loads(later.read_text()), "format": 99}))
    assert main(["list", "runs", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    reopened = json.loads(captured.out.splitlines()[-1])
    assert [one["name"] for one in reopened] == ["a-whole", "b-cut", "c-later", "d-whole"]
    assert [one["finished"] for one in reopened] == [True, False, False, True]
    assert reopened[0]["test"] == reopened[3]["test"] == (finished.results or {})["test"]
    assert str(cut) in reopened[1]["problem"]
    assert "damaged" in reopened[1]["problem"]
    assert "format 99" in reopened[2]["problem"]
    for one in reopened:
        assert one["name"] in captured.err


def test_any_name_has_a_learning_curve(finished: Run, tmp_path: Path) -> None:
    """A dollar sign in it begins no formula."""
    run = train(finished.experiment, out=tmp_path, name="a$_$ %{^")
    assert run.results is not None
    assert (run.folder / "curve.png").stat().st_size


def test_failed_learning_curve_does_not_stop_a_run(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Run) -> None:
        raise RuntimeError("no fonts")

    notes: list[str] = []
    monkeypatch.setattr("softprompt.runs.model_card._curve", fail)
    monkeypatch.setattr(NullCallback, "on_note", lambda self, text: notes.append(text))
    run = train(finished.experiment, out=tmp_path, callback=NullCallback())
    assert open_run(run.folder).results
    assert notes[-1] == "the learning curve could not be drawn (no fonts); the run is complete without it"
