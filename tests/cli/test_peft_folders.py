"""Stock PEFT folders in place of a run: the commands that take them, and what each says of one that it cannot use."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from called import call
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from softprompt import Backbone, Experiment, Plain, Run, TrainingConfig, evaluate, load_backbone, predict, runs, train
from softprompt.serve.config import ServeConfig
from softprompt.tasks.user import load_task

TEXTS = ["a a a", "b b", "f f f f f", "c"]


@pytest.fixture(scope="module")
def backbone(llama_folder: Path) -> Backbone:
    return load_backbone(str(llama_folder), dtype="float32")


@pytest.fixture(scope="module")
def run(llama_folder: Path, ticket_task: Path, backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Run:
    experiment = Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=Plain(length=6),
        training=TrainingConfig(steps=4, batch_size=8, eval_steps=2),
        dtype="float32",
    )
    return train(experiment, out=tmp_path_factory.mktemp("runs"), name="mine", backbone=backbone)


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """The run's prompt as PEFT has it: two files, and no word of a task."""
    (tmp_path / "saved").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run.folder / name, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture(scope="module")
def p_tuning(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """P-tuning of the same model, saved by PEFT."""
    saved = tmp_path_factory.mktemp("p-tuning")
    torch.manual_seed(0)
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), config).save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def lora(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("lora")
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(saved)
    return saved


def test_folder_scores_and_answers_as_its_run(run: Run, folder: Path, ticket_task: Path, backbone: Backbone) -> None:
    task = str(ticket_task)
    assert evaluate(folder, task=task, backbone=backbone) == evaluate(run, backbone=backbone)
    own, theirs = predict(run, TEXTS, backbone=backbone), predict(folder, TEXTS, task=task, backbone=backbone)
    assert [answer.label for answer in theirs] == [answer.label for answer in own]
    for ours, answer in zip(own, theirs, strict=True):
        assert answer.probabilities == pytest.approx(ours.probabilities, abs=1e-6)


def test_commands_take_a_folder_with_a_task(
    p_tuning: Path, ticket_task: Path, llama_folder: Path, tmp_path: Path
) -> None:
    where = ["--task", ticket_task]
    scored = call("evaluate", p_tuning, *where, "--split", "dev").result
    assert (scored["run"], scored["task"], scored["split"]) == (str(p_tuning), str(ticket_task), "dev")
    assert scored["n"] > 0
    rows = tmp_path / "rows.csv"
    rows.write_text("text\n" + "\n".join(TEXTS) + "\n")
    answers = call("predict", p_tuning, *where, "--input", rows, "--backbone", llama_folder)
    assert (answers.code, len(answers.out)) == (0, len(TEXTS))
    assert "note:" not in answers.err
    [ranks] = call("rank", p_tuning).result["prompts"]
    assert (ranks["length"], ranks["dim"]) == (3, 32)
    expected = load_file(p_tuning / "adapter_model.safetensors")["prompt_embeddings"]
    call("export", p_tuning, *where, "--to", "npz", "--output", tmp_path / "npz").result  # noqa: B018  (exit 0)
    with np.load(tmp_path / "npz" / "prompts.npz") as arrays:
        assert np.array_equal(arrays[f"{p_tuning.name}.matrix"], expected)
    call("export", p_tuning, *where, "--output", tmp_path / "peft").result  # noqa: B018
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 3)
    assert ServeConfig(sources=(str(p_tuning),)).backbone_source() == str(llama_folder)


def test_prompt_that_peft_trained_starts_a_run(
    p_tuning: Path, llama_folder: Path, ticket_task: Path, backbone: Backbone
) -> None:
    experiment = Experiment(
        backbone=str(llama_folder), task=str(ticket_task), prompt=Plain(length=3), init_prompt=str(p_tuning)
    )
    started = runs.build_prompt(experiment, load_task(experiment.task), backbone, initialize=True).prompt()
    expected = load_file(p_tuning / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(started.detach(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("command", [["evaluate"], ["predict", "--input", "rows.csv"], ["export"]])
def test_folder_without_a_task_needs_one(command: list[str], folder: Path) -> None:
    assert (
        "is a PEFT prompt and names no task; say which one it is for with --task"
        in call(command[0], folder, *command[1:]).sentence
    )


@pytest.mark.parametrize("command", [["predict", "--input", "rows.csv"], ["export"]])
def test_run_takes_no_other_task(command: list[str], run: Run, ticket_task: Path) -> None:
    arguments = [command[0], run.folder, *command[1:], "--task", ticket_task]
    assert "is a run and has its own task; leave --task out" in call(*arguments).sentence


@pytest.mark.parametrize(
    "command",
    [["evaluate"], ["predict", "--input", "rows.csv"], ["export"], ["rank"], ["train", "--init-prompt"], ["serve"]],
)
def test_lora_folder_is_refused_by_name(
    command: list[str], lora: Path, ticket_task: Path, llama_folder: Path, tmp_path: Path
) -> None:
    arguments: list[object] = [*command, lora]
    if command[0] in ("evaluate", "export"):
        arguments += ["--task", ticket_task]
    elif command[0] == "predict":
        arguments = ["predict", lora, *command[1:], "--task", ticket_task]
    elif command[0] == "train":
        arguments += ["--backbone", llama_folder, "--task", ticket_task, "--out", tmp_path / "out", "plain"]
    elif command[0] == "serve":
        arguments += ["--port", "0"]
    sentence = call(*arguments).sentence
    assert "is a LORA adapter, which changes the model's own weights or layers; merge it" in sentence
    assert not list(tmp_path.iterdir())


def test_another_base_model_is_noted_and_not_refused(
    folder: Path, ticket_task: Path, llama_folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other-model"}))
    called = call("evaluate", folder, "--task", ticket_task, "--backbone", llama_folder)
    assert called.result["n"] > 0
    assert "was trained on org/other-model; make sure that" in " ".join(called.err.split())
    both = call("export", folder, tmp_path / "saved", "--task", ticket_task, "--to", "npz")
    assert "two runs are named 'saved'" in both.sentence


def test_export_needs_the_backbone_of_two_names(folder: Path, run: Run, ticket_task: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other-model"}))
    arguments = ["export", run.folder, folder, "--task", ticket_task, "--to", "npz", "--output", tmp_path / "out"]
    assert "one export holds prompts of one backbone, so if these are the same weights" in call(*arguments).sentence
    written = call(*arguments, "--backbone", run.experiment.backbone).result
    assert written["prompts"] == {"mine": 6, "saved": 6}


def test_missing_base_model_says_where_to_name_it(folder: Path, ticket_task: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "names no base model; give it with --backbone" in call("evaluate", folder, "--task", ticket_task).sentence
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/gone"}))
    sentence = call("evaluate", folder, "--task", ticket_task).sentence
    assert "names the base model org/gone, which cannot be loaded" in sentence
    assert "give its current path with --backbone" in sentence
