"""Gradient checkpointing: the same numbers, computed again in place of being kept."""

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


def kept(prompted: PromptedModel, on: bool) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and the numbers that the forward pass keeps for the backward one."""
    sizes: dict[int, int] = {}
    frozen = {one.data_ptr() for one in prompted.backbone.model.state_dict().values()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in frozen:
            sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with gradient_checkpointing(prompted.backbone.model, on):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(prompted)
        found = torch.autograd.grad(loss, list(prompted.parameters()))
    return loss.detach(), list(found), sum(sizes.values())


@pytest.mark.parametrize(("kind", "prompt_attention"), KINDS)
def test_the_same_numbers_with_less_kept(kind: str, prompt_attention: str, tiny_backbone: MakeBackbone) -> None:
    prompted = attached(tiny_backbone(kind), prompt_attention)
    forwards = [type(module).forward for module in prompted.backbone.model.modules()]
    loss, gradients, numbers = kept(prompted, False)
    again, others, fewer = kept(prompted, True)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-6)
    assert fewer < 0.6 * numbers
    assert [module.forward.__func__ for module in prompted.backbone.model.modules()] == forwards, "all put back"


@pytest.mark.parametrize("dropout", [False, True])
def test_a_training_comes_to_the_same(
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


def test_it_is_another_means_and_the_same_experiment() -> None:
    one, other = (Experiment(training=TrainingConfig(gradient_checkpointing=on)) for on in (False, True))
    assert one.hash == other.hash


def test_a_layer_keeps_a_forward_of_its_own(tiny_backbone: MakeBackbone) -> None:
    model = tiny_backbone("qwen3").model
    layer, calls = model.model.layers[0], []
    whole = layer.forward

    def hooked(*given: Any, **also: Any) -> Any:
        calls.append(1)
        return whole(*given, **also)

    layer.forward = hooked
    try:
        with gradient_checkpointing(model, True):
            pass
        assert layer.forward is hooked
    finally:
        del layer.forward


@pytest.mark.parametrize("kind", ["mpnet"])
def test_a_model_without_such_layers_is_refused(
    kind: str, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    experiment = Experiment(backbone=kind, task=str(ticket_task), training=TrainingConfig(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="has no layers that can be computed again; leave it off"):
        train(experiment, out=tmp_path, backbone=tiny_backbone(kind))
    assert not list(tmp_path.iterdir())


def test_a_run_that_had_no_memory_goes_on_with_it(
    llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line, and by a sweep's file that was changed."""
    file, seen = tmp_path / "sweep.toml", list[bool]()

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

    losses = TrainingStep.losses

    def short(self: TrainingStep, *given: Any) -> Any:
        seen.append(self.settings.gradient_checkpointing)
        if not seen[-1]:
            raise RuntimeError("out of memory")
        return losses(self, *given)

    monkeypatch.setattr(TrainingStep, "losses", short)
    assert sweep("false") == 1
    [run] = (tmp_path / "out").iterdir()
    copy = shutil.copytree(run, tmp_path / "copy")
    assert sweep("true") == 0
    assert main(["train", "--resume", str(copy)]) == 1
    assert main(["train", "--resume", str(copy), "--gradient-checkpointing"]) == 0
    assert main(["train", "--resume", str(copy), "--steps", "3"]) != 0
    assert seen == [False, True, True, False, True, True]


@pytest.mark.parametrize(("kind", "place"), [("bloom", "prefix"), ("gemma2", "prefix"), ("llama", "suffix")])
def test_where_rows_go_on_from_a_cache_it_is_refused(
    kind: str, place: Any, tiny_backbone: MakeBackbone, ticket_task: Path, tmp_path: Path
) -> None:
    experiment = Experiment(
        backbone=kind,
        task=str(ticket_task),
        prompt_position=place,
        training=TrainingConfig(gradient_checkpointing=True),
    )
    with pytest.raises(ValueError, match=r"gradient_checkpointing is on, and rows of .* go on from a cache"):
        train(experiment, out=tmp_path, backbone=tiny_backbone(kind))
    assert not list(tmp_path.iterdir())
