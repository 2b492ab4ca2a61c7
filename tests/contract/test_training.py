"""Training changes only the prompt, and equal experiments give equal runs."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softprompt import (
    DPT,
    Backbone,
    Experiment,
    Progress,
    Run,
    TrainingConfig,
    attach,
    evaluate,
    load_backbone,
    open_run,
    train,
)
from softprompt.export import FORMATS, export_runs
from softprompt.models.causal import Causal
from softprompt.prompts import METHODS, Folded
from softprompt.runs import build_prompted_model
from softprompt.serve.prompts.entry import from_folder
from softprompt.training.callbacks import NullCallback
from softprompt.types import PromptPosition

EXAMPLES = Path(__file__).parents[2] / "examples"
MakeBackbone = Callable[[str], Backbone]


@pytest.fixture(scope="module")
def experiment(llama_folder: Path, ticket_task: Path) -> Experiment:
    return Experiment(
        backbone=str(llama_folder),
        task=str(ticket_task),
        prompt=DPT(length=6, rank=2),
        training=TrainingConfig(steps=6, batch_size=8, eval_steps=3),
        dtype="float32",
    )


@pytest.fixture(scope="module")
def backbone(llama_folder: Path) -> Backbone:
    return load_backbone(str(llama_folder), dtype="float32")


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "softprompt.safetensors")


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics()]


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_only_the_prompt(
    method: str, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    before = {name: weights.clone() for name, weights in backbone.model.state_dict().items()}
    checksum = backbone.checksum()
    variant = experiment.replace(prompt=METHODS[method](), training=TrainingConfig(steps=2, batch_size=8, eval_steps=2))
    run = train(variant, out=tmp_path, backbone=backbone)
    assert backbone.checksum() == checksum == run.record["backbone"]["hash"]
    assert all(torch.equal(weights, before[name]) for name, weights in backbone.model.state_dict().items())
    assert not any(weights.requires_grad or weights.grad is not None for weights in backbone.model.parameters())
    fresh, trained = build_prompted_model(run.experiment, run.task, backbone, initialize=False).prompt, tensors(run)
    assert fresh is not None
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, trained[name]), f"{name} did not change"
    for name, buffer in fresh.named_buffers():
        assert torch.equal(buffer, trained[name]), f"{name} is a buffer and changed"


def test_changed_backbone_is_reported(
    experiment: Experiment, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_backbone(str(llama_folder), dtype="float32")

    def change_weights(_: object, __: Progress) -> None:
        next(loaded.model.parameters()).data[0, 0] += 1

    monkeypatch.setattr(NullCallback, "on_step", change_weights)
    with pytest.raises(RuntimeError, match=r"the weights of .* changed in training"):
        train(experiment, out=tmp_path, backbone=loaded)


def test_equal_experiments_give_equal_runs(experiment: Experiment, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = train(experiment, out=tmp_path)
    torch.manual_seed(2)
    second = train(experiment, out=tmp_path)
    other = train(experiment.replace(seed=1), out=tmp_path)
    assert [run.name for run in (first, second, other)] == ["tickets-dpt-0", "tickets-dpt-0-2", "tickets-dpt-1"]
    assert losses(first) == losses(second) != losses(other)
    assert all(torch.equal(tensor, tensors(second)[name]) for name, tensor in tensors(first).items())


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_gradient_accumulation_keeps_the_loss(
    experiment: Experiment, backbone: Backbone, tmp_path: Path, weight: float
) -> None:
    def run(parts: int) -> Run:
        training = TrainingConfig(
            steps=4, batch_size=8, eval_steps=4, vocabulary_weight=weight, gradient_accumulation_steps=parts
        )
        return train(experiment.replace(training=training), out=tmp_path, backbone=backbone)

    single, accumulated = run(1), run(4)
    assert losses(accumulated) == pytest.approx(losses(single), rel=1e-5)
    # Adam divides by the gradient's size, which amplifies rounding: tensors differ more than losses.
    for name, tensor in tensors(single).items():
        torch.testing.assert_close(tensors(accumulated)[name], tensor, rtol=0, atol=1e-4)


def test_best_prompt_is_saved_and_patience_stops_early(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    # With a negligible learning rate the first evaluation stays the best, and two more stop the run.
    training = TrainingConfig(steps=20, batch_size=8, eval_steps=1, lr=1e-9, patience=2)
    run = train(experiment.replace(training=training), out=tmp_path, backbone=backbone)
    assert run.results is not None
    assert (run.results["steps"], run.results["best_step"]) == (3, 1)
    at_best = load_file(run.folder / "checkpoints/step-000001/prompt.safetensors")
    assert all(torch.equal(tensor, at_best[f"prompt.{name}"]) for name, tensor in tensors(run).items())
    assert open_run(run.folder).results == run.results


def test_method_dropout_is_on_only_in_training(
    experiment: Experiment, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, modes = Causal.score, []

    def spy(prompted: Causal, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(prompted.prompt, Folded):
            modes.append((torch.is_grad_enabled(), prompted.prompt.training))
        return score(prompted, *args, **kwargs)

    monkeypatch.setattr(Causal, "score", spy)
    train(experiment, out=tmp_path, backbone=backbone)
    steps, evaluation = [(True, True)] * 3, [(False, False)]
    assert modes == (steps + evaluation) * 2


def test_results_are_of_the_test_split_with_majority(
    experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    training = TrainingConfig(steps=2, batch_size=8, eval_steps=2)
    run = train(experiment.replace(training=training), out=tmp_path, backbone=backbone)
    results = run.results
    assert results is not None
    answers = run.predictions()
    right = sum(answer["answer"] == answer["gold"] for answer in answers) / len(answers)
    assert results["n_test"] == len(answers) == 24
    assert results["test"] == pytest.approx(right)
    assert results["majority"] == pytest.approx(1 / 6)
    assert 0 <= results["ci_low"] <= results["test"] <= results["ci_high"] <= 1
    assert results["trainable"] == DPT(length=6, rank=2).count(backbone.dim)


def test_loss_decreases(experiment: Experiment, backbone: Backbone, tmp_path: Path) -> None:
    """A random model can at least learn how frequent each answer is."""
    training = TrainingConfig(steps=60, batch_size=24, eval_steps=60, lr=0.1)
    run = train(experiment.replace(prompt=DPT(length=10, rank=8), training=training), out=tmp_path, backbone=backbone)
    epoch = 4  # batches; a single one may have easy rows
    assert sum(losses(run)[-epoch:]) < 0.9 * sum(losses(run)[:epoch])


def test_custom_loop_example_trains(llama_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"](str(llama_folder), 8)
    printed_losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(printed_losses) == 8
    assert printed_losses[-1] < printed_losses[0]


def test_transformers_trainer_example_trains(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone(str(llama_folder), dtype="float32")
    prompt = runpy.run_path(str(EXAMPLES / "with_trainer.py"))["main"](str(llama_folder), str(tmp_path), 4)
    fresh = DPT(length=20, rank=4).build(backbone.host(), torch.Generator().manual_seed(0))
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, prompt.state_dict()[name]), name
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(adapter, prompt.prompt(), rtol=0, atol=0)


def test_prompted_model_has_only_the_prompts_parameters(tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("gpt2")
    prompt = DPT(length=6, rank=2).build(backbone.host(), torch.Generator().manual_seed(0))
    prompted = attach(backbone, prompt)
    assert set(map(id, prompted.parameters())) == set(map(id, prompt.parameters()))
    prompted.train()
    assert not backbone.model.training


@pytest.mark.parametrize("position", ["after_bos", "suffix"])
def test_prompt_position_holds_in_training_and_use(
    position: PromptPosition, experiment: Experiment, backbone: Backbone, tmp_path: Path
) -> None:
    run = train(experiment.replace(prompt_position=position), out=tmp_path / "runs", backbone=backbone)
    prefix_run = train(experiment, out=tmp_path / "front", backbone=backbone)
    assert losses(run) != losses(prefix_run)
    assert evaluate(run, backbone=backbone).value == run.results["test"]
    assert not (run.folder / "adapter_config.json").exists()
    assert "PEFT puts every prompt in front of it" in (run.folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"the prompt of run .* is after the text"):
        export_runs([run], FORMATS["npz"], tmp_path / "export", backbone=backbone)
    assert not (tmp_path / "export").exists()
    with pytest.raises(ValueError, match=r"the prompt of run .* is after the text"):
        from_folder("one", run.folder, backbone)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_prompt_attention_self_holds_in_training_and_use(
    name: str, experiment: Experiment, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    loaded = tiny_backbone(name)
    run = train(experiment.replace(prompt_attention="self"), out=tmp_path / "runs", backbone=loaded)
    full_run = train(experiment, out=tmp_path / "joint", backbone=loaded)
    assert losses(run) != losses(full_run)
    assert evaluate(run, backbone=loaded).value == run.results["test"]
    assert run.prompted(loaded).prompt_attention == "self"
    assert not (run.folder / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {"prompt_position": "after_bos"}, "prompt_position is 'after_bos', which .* does not support"),
        ("llama", {"prompt_attention": "self"}, "prompt_attention is 'self', which .* does not support"),
        ("t5", {"prompt_attention": "self", "training": TrainingConfig(dropout=True)}, "leave dropout off"),
        (
            "llama",
            {"baseline": "lora", "prompt_position": "suffix"},
            "prompt_position is for prompts, but the baseline lora has none",
        ),
        ("llama", {"init_prompt": "/nowhere/run"}, "there is no folder /nowhere/run"),
        ("t5", {"depth": "deep"}, "depth is deep, but .* takes prompts in front of the input only"),
        ("llama", {"depth": "deep", "prompt_position": "suffix"}, "come before the text; leave one of them out"),
    ],
)
def test_unfit_settings_are_refused_before_the_folder(
    name: str,
    changes: dict[str, Any],
    message: str,
    experiment: Experiment,
    tiny_backbone: MakeBackbone,
    tmp_path: Path,
) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        train(experiment.replace(**changes), out=tmp_path / "runs", backbone=tiny_backbone(name))
    assert not (tmp_path / "runs").exists()
