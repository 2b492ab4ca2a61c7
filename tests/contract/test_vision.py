"""Every method in front of images, shallow and deep: what the contract asks of it, and a run from start to end."""

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from softprompt import (
    BPT,
    DPT,
    Backbone,
    Experiment,
    Plain,
    Progress,
    TrainingConfig,
    attach,
    evaluate,
    open_run,
    predict,
    resume,
    train,
)
from softprompt.cli import main
from softprompt.models import PromptedModel, fresh_head
from softprompt.prompts import METHODS, SoftPrompt
from softprompt.prompts.deep import build
from softprompt.tasks.data.splits import splits
from softprompt.tasks.user import load_task

BACKBONES = ("vit", "dinov2")
"""tests/parity has the others too."""
SMALL = {"length": 4, "rank": 2, "width": 4, "positions": 30}
FITTING = sorted(name for name, config in METHODS.items() if config.folds == "prompt")
OTHERS = sorted(set(METHODS) - set(FITTING))

methods = pytest.mark.parametrize("method", FITTING)
layer_counts = pytest.mark.parametrize("num_layers", [1, 3])
backbones = pytest.mark.parametrize("name", BACKBONES)
MakeBackbone = Callable[[str], Backbone]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=seeded(3))


def prompt_of(method: str, backbone: Backbone, num_layers: int, seed: int = 0) -> SoftPrompt:
    config = METHODS[method]()
    config = config.replace(**{name: value for name, value in SMALL.items() if hasattr(config, name)})
    prompt = build(config, backbone.hosts(num_layers), seeded(seed))
    assert sum(parameter.numel() for parameter in prompt.parameters()) == num_layers * config.count(backbone.dim)
    return prompt


def attachment_of(method: str, backbone: Backbone, num_layers: int) -> PromptedModel:
    return attach(backbone, prompt_of(method, backbone, num_layers), head=fresh_head(backbone, 3, seeded(2)))


def test_all_but_the_methods_that_shift_by_tokens_fit() -> None:
    assert {"plain", "bpt", "residual"} <= set(FITTING)
    assert OTHERS


@methods
@backbones
@layer_counts
def test_shape_scale_and_determinism(method: str, name: str, num_layers: int, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone(name).with_sample_images(pixels())
    prompt = prompt_of(method, backbone, num_layers)
    assert prompt.prompt().shape == (num_layers * 4, 32)
    assert prompt.num_matrices == prompt.fold().num_matrices == num_layers
    assert torch.equal(prompt.prompt(), prompt_of(method, backbone, num_layers).prompt())
    assert not torch.equal(prompt.prompt(), prompt_of(method, backbone, num_layers, seed=1).prompt())
    if num_layers > 1:  # layers do not start alike, though each is drawn from its own layer's inputs
        layers = prompt.prompt().view(num_layers, 4, 32)
        assert not torch.equal(layers[0], layers[1])


@methods
@backbones
@layer_counts
def test_one_step_moves_prompt_and_head_and_no_bit_of_the_backbone(
    method: str, name: str, num_layers: int, tiny_backbone: MakeBackbone
) -> None:
    backbone = tiny_backbone(name)
    prompted, before = attachment_of(method, backbone, num_layers), backbone.checksum()
    named = dict(prompted.named_parameters())
    grouped = [id(parameter) for group in prompted.groups().values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in named.values())
    with torch.no_grad():  # off the first values, of which some are zeros that stop another's gradient
        for parameter in named.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(len(parameter)))
    first = {key: parameter.detach().clone() for key, parameter in named.items()}
    training_step = torch.optim.Adam(prompted.parameters(), lr=0.01)
    scores = prompted.score(pixels(), None, ((0,), (1,), (2,)))
    assert scores.shape == (4, 3)
    nn.functional.cross_entropy(scores, torch.tensor([0, 2, 1, 1])).backward()
    training_step.step()
    for key, parameter in named.items():
        assert parameter.grad is not None, key
        assert math.isfinite(float(parameter.grad.norm())), key
        assert not torch.equal(parameter, first[key]), key
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert backbone.checksum() == before


@methods
@layer_counts
def test_live_equals_folded_and_survives_a_file(
    method: str, num_layers: int, tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    backbone = tiny_backbone("dinov2")
    prompted = attachment_of(method, backbone, num_layers).eval()
    with torch.no_grad():
        live = prompted(pixels()).logits
        folded = prompted.folded()
        assert isinstance(folded.prompt, SoftPrompt)
        assert not list(folded.prompt.parameters())
        torch.testing.assert_close(folded(pixels()).logits, live)
        save_file({name: tensor.contiguous() for name, tensor in prompted.state_dict().items()}, tmp_path / "it")
        other = attach(
            backbone, prompt_of(method, backbone, num_layers, seed=7), head=fresh_head(backbone, 3, seeded(8))
        )
        other.load_state_dict(load_file(tmp_path / "it"))
        torch.testing.assert_close(other.eval()(pixels()).logits, live, rtol=0, atol=0)


@pytest.mark.parametrize("method", OTHERS)
@layer_counts
def test_a_method_that_shifts_by_tokens_is_refused(method: str, num_layers: int, tiny_backbone: MakeBackbone) -> None:
    backbone = tiny_backbone("vit")
    with pytest.raises(ValueError, match="changes the input's own embeddings"):
        attachment_of(method, backbone, num_layers)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: MakeBackbone) -> Path:
    """A tiny DINOv2 of weights alone, as a user has a model."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-dinov2"
    tiny_backbone("dinov2").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of thirty images each, PNG and JPEG, of several sizes; a class is a color."""
    folder = tmp_path_factory.mktemp("photos")
    draw = random.Random(0)
    for name, color in (("grass", (30, 180, 40)), ("sea", (20, 60, 200)), ("sunset", (220, 110, 30))):
        (folder / name).mkdir()
        for number in range(30):
            size = (draw.randint(20, 60), draw.randint(20, 60))
            shade = tuple(min(255, max(0, value + draw.randint(-30, 30))) for value in color)
            dark = tuple(value // 3 for value in shade)
            image = Image.new("RGB", size, shade)
            image.paste(dark, (0, 0, draw.randint(2, 9), draw.randint(2, 9)))  # so that a crop changes something
            image.save(folder / name / f"{number:02}.{'jpg' if number % 2 else 'png'}")
    return folder


def experiment_of(backbone: Path, task: Path | str, **changes: Any) -> Experiment:
    training = TrainingConfig(steps=6, batch_size=8, eval_steps=3, image_size=16)
    values = {"prompt": Plain(length=3), "training": training, "dtype": "float32", **changes}
    return Experiment(backbone=str(backbone), task=str(task), **values)


@pytest.mark.parametrize("depth", ["shallow", "deep"])
@pytest.mark.parametrize("pool", ["cls", "patches"])
def test_a_folder_of_images_trains_evaluates_and_predicts(
    depth: Any, pool: Any, dinov2_folder: Path, photos: Path, tmp_path: Path
) -> None:
    run = train(experiment_of(dinov2_folder, photos, depth=depth, pool=pool), out=tmp_path)
    assert run.results is not None
    assert run.results["trainable"] == (3 if depth == "deep" else 1) * 3 * 32 + 32 * 3 + 3
    assert run.results["n_test"] == 18
    again = open_run(run.folder)
    assert evaluate(again).value == run.results["test"]
    found = predict(again, [{"image": str(photos / "sea" / "00.png")}])
    assert found[0].label in {"grass", "sea", "sunset"}
    assert sum(found[0].probabilities.values()) == pytest.approx(1)
    card = (run.folder / "README.md").read_text()
    assert "Stock PEFT cannot load it: PEFT has no prompt-tuning format for vision models" in card
    assert ("one prompt per layer" in card) == (depth == "deep")
    assert not (run.folder / "adapter_config.json").exists()


def test_it_learns_colors(dinov2_folder: Path, photos: Path, tmp_path: Path) -> None:
    training = TrainingConfig(steps=60, batch_size=16, eval_steps=20, image_size=16, lr=0.1)
    run = train(experiment_of(dinov2_folder, photos, training=training), out=tmp_path)
    assert run.results is not None
    assert run.results["test"] > run.results["majority"] + 0.3


class Notes:
    """A watcher that remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_stage(self, text: str) -> None:
        pass

    def on_note(self, text: str) -> None:
        self.said.append(text)

    def on_step(self, progress: Progress) -> None:
        pass


class Stops(Exception):
    pass


class StopAt:
    """A watcher that ends the process's work after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.last = step

    def on_stage(self, text: str) -> None:
        pass

    def on_note(self, text: str) -> None:
        pass

    def on_step(self, progress: Progress) -> None:
        if progress.step == self.last:
            raise Stops


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_training_with_random_crops_goes_on_bit_by_bit(
    stop: int, dinov2_folder: Path, photos: Path, tmp_path: Path
) -> None:
    """Stopped before its first checkpoint and after one; whitening samples the same training images again."""
    training = TrainingConfig(steps=6, batch_size=8, eval_steps=3, image_size=16, augment="crop+flip")
    config = BPT(length=3, mode="frozen")
    experiment = experiment_of(dinov2_folder, photos, training=training, prompt=config, depth="deep")
    whole = train(experiment, out=tmp_path, name="whole")
    with pytest.raises(Stops):
        train(experiment, out=tmp_path, name="cut", callback=StopAt(stop))
    again = resume(tmp_path / "cut")
    for file in ("metrics.jsonl", "softprompt.safetensors", "head.safetensors", "predictions.jsonl"):
        assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file
    plain = train(
        experiment.replace(training=TrainingConfig(steps=6, batch_size=8, eval_steps=3, image_size=16)), out=tmp_path
    )
    assert [line["loss"] for line in plain.metrics()] != [line["loss"] for line in whole.metrics()]


def test_a_head_alone_is_a_baseline(dinov2_folder: Path, photos: Path, tmp_path: Path) -> None:
    run = train(experiment_of(dinov2_folder, photos, baseline="head", prompt=Experiment().prompt), out=tmp_path)
    assert run.results is not None
    assert run.results["trainable"] == 32 * 3 + 3
    assert evaluate(open_run(run.folder)).value == run.results["test"]


def test_a_warm_start_is_layer_by_layer(dinov2_folder: Path, photos: Path, tmp_path: Path) -> None:
    experiment = experiment_of(dinov2_folder, photos, depth="deep")
    first = train(experiment, out=tmp_path, name="first")
    warm = experiment.replace(init_prompt=str(first.folder), prompt=DPT(length=3, rank=3))
    notes = Notes()
    train(warm, out=tmp_path, name="again", callback=notes)
    [error] = [float(note.split()[-1]) for note in notes.said if "relative error" in note]
    assert error < 1e-5
    with pytest.raises(ValueError, match="has 3 matrices and the new one 1"):
        train(warm.replace(depth="shallow", prompt=Plain(length=9)), out=tmp_path)


def test_the_command_line_takes_a_folder_a_table_and_an_image(
    dinov2_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--image-size", "16", "--steps", "2", "--batch-size", "4", "--eval-steps", "2", "--dtype", "float32"]
    flags += ["--augment", "crop", "--depth", "deep"]
    start = ["train", "--backbone", str(dinov2_folder), "--task", str(photos), "--out", str(tmp_path), "--name", "it"]
    assert main([*start, *flags, "plain", "--length", "2"]) == 0
    run = str(tmp_path / "it")
    table = photos / "some.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([["image"], ["sea/00.png"], ["grass/01.jpg"]])
    try:
        for given, count in ((photos / "sea", 30), (table, 2), (photos / "sea" / "01.jpg", 1)):
            capsys.readouterr()
            assert main(["predict", run, "--input", str(given)]) == 0
            lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
            assert len(lines) == count
            assert lines[0]["image"].endswith(("sea/00.png", "sea/01.jpg"))
    finally:
        table.unlink()
    assert main(["evaluate", run]) == 0
    assert main(["export", run]) == 1
    assert "PEFT has no prompt-tuning format for vision models" in capsys.readouterr().err


@pytest.mark.asset
def test_mnist_is_five_thousand_digits(tmp_path: Path) -> None:
    rows = splits(load_task("mnist"))
    assert [len(part) for part in (rows.train, rows.dev, rows.test)] == [3500, 500, 1000]
    assert sorted(set(rows.test["label"])) == [str(digit) for digit in range(10)]
