"""Backbones with 4 bits per weight: prompts are trained, saved and used on the quantized weights."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt import DPT, Experiment, Run, TrainingConfig, attach, evaluate, load_backbone, open_run, train
from softprompt.backbones.kernels import llama
from softprompt.backbones.kernels.dequantize import dequantized_weight
from softprompt.backbones.projections import query_key
from softprompt.backbones.quantization import KINDS
from softprompt.export import FORMATS, export_runs

QUANTIZED = pytest.mark.parametrize("kind", KINDS)


def experiment(folder: Path, task: Path, kind: Any, **settings: Any) -> Experiment:
    training = TrainingConfig(steps=6, batch_size=8, eval_steps=3)
    return Experiment(
        backbone=str(folder), task=str(task), prompt=DPT(length=6, rank=2), training=training, dtype=kind, **settings
    )


@pytest.fixture(scope="module", params=KINDS)
def run(
    request: pytest.FixtureRequest, llama_folder: Path, ticket_task: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    return train(experiment(llama_folder, ticket_task, request.param), out=tmp_path_factory.mktemp("runs"))


@QUANTIZED
def test_loss_equals_the_models_own_forward(kind: Any, llama_folder: Path) -> None:
    backbone = load_backbone(str(llama_folder), dtype=kind)
    assert backbone.precision == kind
    assert {weights.dtype for weights in backbone.model.model.layers.parameters()} >= {torch.bfloat16}
    prompt = DPT(length=6, rank=2).build(backbone.host(), torch.Generator().manual_seed(0))
    ids = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(9) < 7, -100, ids)
    ours = attach(backbone, prompt)(ids, None, labels).loss
    vectors = prompt.prompt().to(backbone.dtype).expand(4, -1, -1)
    embeds = torch.cat([vectors, backbone.model.get_input_embeddings()(ids)], 1)
    theirs = backbone.model(inputs_embeds=embeds, labels=torch.cat([torch.full((4, 6), -100), labels], 1)).loss
    parameters = list(prompt.parameters())
    torch.testing.assert_close(ours, theirs.float(), rtol=2e-2, atol=2e-2)
    for mine, its in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters), strict=True):
        assert float((mine - its).norm() / its.norm()) < 0.05


@QUANTIZED
def test_fused_layers_equal_dequantized_layers(kind: Any, llama_folder: Path) -> None:
    """To the bit, with the same weights dequantized once."""
    backbone = load_backbone(str(llama_folder), dtype=kind)
    assert llama.is_supported(backbone.model)
    ids = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(9) < 7, -100, ids)
    results = []
    for _ in range(2):
        prompt = DPT(length=6, rank=2).build(backbone.host(), torch.Generator().manual_seed(0))
        loss = attach(backbone, prompt)(ids, None, labels).loss
        results.append([loss, *torch.autograd.grad(loss, list(prompt.parameters()))])
        for layer in backbone.model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        dequantized = torch.nn.Linear(linear.in_features, linear.out_features, bias=False)
                        dequantized.weight = torch.nn.Parameter(dequantized_weight(linear), requires_grad=False)
                        setattr(part, name, dequantized)
    assert all(torch.equal(quantized, dequantized) for quantized, dequantized in zip(*results, strict=True))


@QUANTIZED
def test_weights_take_a_quarter_of_the_memory(kind: Any, llama_folder: Path) -> None:
    sizes = []
    for dtype in ("bfloat16", kind):
        weights = load_backbone(str(llama_folder), dtype=dtype).model.model.layers[0].mlp.up_proj.weight
        sizes.append(weights.numel() * weights.element_size())
    assert sizes[0] / sizes[1] == {"nf4": 4}[kind]


def test_run_records_dtype_and_scores_again(run: Run) -> None:
    assert run.record["backbone"]["dtype"] == run.experiment.dtype
    assert run.results is not None
    again = evaluate(open_run(run.folder))
    assert again.value == run.results["test"]


def test_other_weights_are_rejected(run: Run) -> None:
    same, other = (load_backbone(run.experiment.backbone, dtype=run.experiment.dtype) for _ in range(2))
    with torch.no_grad():
        other.model.model.norm.weight.mul_(2)
    assert len(run.prompt(same).prompt()) == 6
    with pytest.raises(ValueError, match="are not those that run"):
        run.prompt(other)


@pytest.mark.parametrize("kind", ["int8", "fp4", ""])
def test_unknown_dtype_is_rejected(kind: Any, llama_folder: Path, unchecked: None) -> None:
    with pytest.raises(ValueError, match=f"^dtype is '{kind}'; it must be auto, float32, bfloat16, float16, nf4$"):
        load_backbone(str(llama_folder), dtype=kind)


@QUANTIZED
def test_resumed_run_loads_the_same_weights(
    kind: Any, llama_folder: Path, ticket_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softprompt import resume
    from softprompt.training.callbacks import NullCallback

    class Stop(Exception):
        pass

    def stop(self: object, progress: Any) -> None:
        if progress.step == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(NullCallback, "on_step", stop)
        with pytest.raises(Stop):
            train(experiment(llama_folder, ticket_task, kind), out=tmp_path, name="run")
    assert resume(tmp_path / "run").results is not None


def test_checkpoint_export_is_rejected(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a checkpoint needs them unquantized; train in bfloat16"):
        export_runs([run], FORMATS["vocab"], tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


@QUANTIZED
def test_unquantized_weights_are_required(kind: Any, llama_folder: Path, ticket_task: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are quantized; give a --dtype without quantization"):
        query_key(load_backbone(str(llama_folder), dtype=kind).model)
    with pytest.raises(ValueError, match="give --dtype float32"):
        train(experiment(llama_folder, ticket_task, kind, baseline="full").replace(prompt=DPT()), out=tmp_path)


def test_missing_extra_names_the_install_command(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"dtype nf4 needs bitsandbytes; .*pip install '\.\[quantize\]'"):
        load_backbone(str(llama_folder), dtype="nf4")
