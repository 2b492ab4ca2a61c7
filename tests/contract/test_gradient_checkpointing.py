"""Gradient checkpointing: equal losses and gradients, with activations recomputed instead of stored."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import attached, loss_of
from safetensors.torch import load_file
from torch import Tensor

from softprompt import DPT, Backbone, Experiment, TrainingConfig, train
from softprompt.backbones.kernels.gradient_checkpointing import gradient_checkpointing
from softprompt.cli import main
from softprompt.models import PromptedModel
from softprompt.training.step import TrainingStep

MakeBackbone = Callable[[str], Backbone]
KINDS = [("llama", "full"), ("qwen3", "full"), ("gemma", "full"), ("t5", "full"), ("t5", "self")]
KINDS += [("bart", "full"), ("bert", "full"), ("bert", "self"), ("roberta_mlm", "full"), ("dinov2", "full")]


def measure(prompted: PromptedModel, on: bool) -> tuple[Tensor, list[Tensor], int]:
    """The loss, the gradients, and the number of elements stored for the backward pass."""
    sizes: dict[int, int] = {}
    frozen = {plain.data_ptr() for plain in prompted.backbone.model.state_dict().values()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in frozen:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with gradient_checkpointing(prompted.backbone.model, on):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(prompted)
        grads = torch.autograd.grad(loss, list(prompted.parameters()))
    return loss.detach(), list(grads), sum(sizes.values())


@pytest.mark.parametrize(("kind", "prompt_attention"), KINDS)
def test_checkpointing_keeps_gradients_and_stores_less(
    kind: str, prompt_attention: str, tiny_backbone: MakeBackbone
) -> None:
    prompted = attached(tiny_backbone(kind), prompt_attention)
    forwards = [type(module).forward for module in prompted.backbone.model.modules()]
    loss, gradients, stored = measure(prompted, False)
    recomputed_loss, recomputed_gradients, stored_with_checkpointing = measure(prompted, True)
    torch.testing.assert_close(recomputed_loss, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(recomputed_gradients, gradients, rtol=1e-5, atol=1e-6)
    assert stored_with_checkpointing < 0.6 * stored
    assert [module.forward.__func__ for module in prompted.backbone.model.modules()] == forwards, (
        "all forwards are restored"
    )


@pytest.mark.parametrize("dropout", [False, True])
def test_checkpointed_run_gives_the_same_prompt(
    dropout: bool, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    backbone = tiny_backbone("t5")
    tensors = []
    for on in (False, True):
        training = TrainingConfig(
            steps=3, batch_size=8, lr=0.003, eval_steps=3, dropout=dropout, gradient_checkpointing=on
        )
        experiment = Experiment(
            backbone="t5", task=str(ticket_task), prompt=DPT(length=6, rank=2), training=training, dtype="float32"
        )
        run = train(experiment, out=tmp_path, name=f"{on}", backbone=backbone)
        tensors.append(load_file(run.folder / "softprompt.safetensors"))
    torch.testing.assert_close(*tensors, rtol=1e-5, atol=1e-6)


def test_checkpointing_keeps_the_experiment_hash() -> None:
    plain, checkpointed = (Experiment(training=TrainingConfig(gradient_checkpointing=on)) for on in (False, True))
    assert plain.hash == checkpointed.hash


def test_custom_layer_forward_is_restored(tiny_backbone: MakeBackbone) -> None:
    model = tiny_backbone("qwen3").model
    layer, calls = model.model.layers[0], []
    original = layer.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = hooked
    try:
        with gradient_checkpointing(model, True):
            pass
        assert layer.forward is hooked
    finally:
        del layer.forward


@pytest.mark.parametrize("kind", ["mpnet"])
def test_model_without_known_layers_is_refused(
    kind: str, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    experiment = Experiment(backbone=kind, task=str(ticket_task), training=TrainingConfig(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="has no layers that can be recomputed; leave it off"):
        train(experiment, out=tmp_path, backbone=tiny_backbone(kind))
    assert not list(tmp_path.iterdir())


def test_run_out_of_memory_resumes_with_checkpointing(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line, and in a changed sweep file."""
    file, passes = tmp_path / "sweep.toml", list[bool]()

    def sweep(on: str) -> int:
        file.write_text(
            f'''
            backbone = "{llama_folder}"
            task = "{ticket_task}"
            dtype = "float32"
            training = {{ steps = 2, batch_size = 8, eval_steps = 2, gradient_checkpointing = {on} }}
            prompt.length = 4
            prompt.rank = 2
            '''
        )
        return main(["sweep", str(file), "--out", str(tmp_path / "out")])

    backbone_modes = TrainingStep.backbone_modes

    def run_out_of_memory(self: TrainingStep) -> Any:
        passes.append(self.settings.gradient_checkpointing)
        if not passes[-1]:
            raise RuntimeError("out of memory")
        return backbone_modes(self)

    monkeypatch.setattr(TrainingStep, "backbone_modes", run_out_of_memory)
    assert sweep("false") == 1
    [run] = (tmp_path / "out").iterdir()
    copy = shutil.copytree(run, tmp_path / "copy")
    assert sweep("true") == 0
    assert main(["train", "--resume", str(copy)]) == 1
    assert main(["train", "--resume", str(copy), "--gradient-checkpointing"]) == 0
    assert main(["train", "--resume", str(copy), "--steps", "3"]) != 0
    assert passes == [False, True, True, False, True, True]


@pytest.mark.parametrize(("kind", "position"), [("bloom", "prefix"), ("gemma2", "prefix"), ("llama", "suffix")])
def test_rows_continuing_from_a_cache_are_refused(
    kind: str, position: Any, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    experiment = Experiment(
        backbone=kind,
        task=str(ticket_task),
        prompt_position=position,
        training=TrainingConfig(gradient_checkpointing=True),
    )
    with pytest.raises(ValueError, match=r"gradient_checkpointing is on, but rows of .* continue from a cache"):
        train(experiment, out=tmp_path, backbone=tiny_backbone(kind))
    assert not list(tmp_path.iterdir())
