"""Backbones that answer through a head: rows of several prompts share a pass, each through its own head."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from softprompt.backbones import Backbone
from softprompt.backbones.image_processor import Picture
from softprompt.models import attach, fresh_head
from softprompt.prompts import METHODS, SoftPrompt
from softprompt.prompts.deep import build
from softprompt.serve import Engine
from softprompt.serve.engine import encode
from softprompt.serve.engine.request import ClassifyParams, EngineRequest
from softprompt.serve.engine.scoring import GeneralScorer
from softprompt.serve.prompts.entry import PromptEntry
from softprompt.tasks.task import Task

MakeBackbone = Callable[[str], Backbone]
PromptOf = Callable[..., SoftPrompt]


def served(name: str, prompt: SoftPrompt, backbone: Backbone, classes: int, seed: int, **more: Any) -> PromptEntry:
    candidates = tuple((index,) for index in range(classes))
    head = fresh_head(backbone, classes, torch.Generator().manual_seed(seed))
    return PromptEntry(name=name, prompt=prompt.fold(), source="run", candidates=candidates, head=head, **more)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_texts_through_heads_of_different_sizes(name: str, tiny_backbone: MakeBackbone, prompt_of: PromptOf) -> None:
    backbone = tiny_backbone(name)
    ones = [served(f"p{seed}", prompt_of(backbone, seed), backbone, 2 + seed, seed) for seed in range(3)]
    rows = [[0, 40, 41, 1], [0, 50, 1], [0, 60, 61, 62, 63, 1], [0, 70, 1]]
    requests = [
        EngineRequest(ones[i % 3], ids, ClassifyParams(candidates=ones[i % 3].candidates)) for i, ids in enumerate(rows)
    ]
    for request, ours in zip(requests, GeneralScorer(backbone)(requests), strict=True):
        one = request.served
        alone = attach(backbone, one.prompt, head=one.head).score(torch.tensor([request.ids]), None, one.candidates)
        assert ours == pytest.approx(alone[0].tolist(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_under_prompts_of_different_depths(name: str, tiny_backbone: MakeBackbone) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    backbone = tiny_backbone(name).with_sample_images(images)
    ones = []
    for seed, depth in enumerate((1, 2, 1)):
        config = METHODS["plain"](length=2 + seed)
        prompt = build(config, backbone.hosts(depth), torch.Generator().manual_seed(seed))
        ones.append(served(f"p{seed}", prompt, backbone, 2 + seed, seed))
    requests = [
        EngineRequest(ones[i % 3], (), ClassifyParams(candidates=ones[i % 3].candidates), pixels=image)
        for i, image in enumerate(images)
    ]
    for request, ours, image in zip(requests, GeneralScorer(backbone)(requests), images, strict=True):
        one = request.served
        alone = attach(backbone, one.prompt, head=one.head).score(image[None], None, one.candidates)
        assert ours == pytest.approx(alone[0].tolist(), abs=1e-5)


def test_an_image_is_what_was_sent_and_never_a_file_of_this_machine(
    tiny_backbone: MakeBackbone, tmp_path: Path
) -> None:
    backbone = tiny_backbone("vit")
    file = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(file)
    task = Task(name="photos", image="image", label="label", label_words={"a": "a", "b": "b"})
    prompt = METHODS["plain"](length=2).build(backbone.host(), torch.Generator())
    one = served("p", prompt, backbone, 2, 0, task=task, max_input_tokens=32)
    expected = Picture(str(file), backbone.tokenizer, 32, "row 1").pixels()
    text = base64.b64encode(file.read_bytes()).decode()
    for row in (text, f"data:image/png;base64,{text}", {"image": text}, {"image": file.read_bytes()}):
        assert torch.equal(encode.images(backbone, one, [row])[0], expected)
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    bad = [str(file), {"image": str(file)}, {"other": text}, "", text[:40], base64.b64encode(huge.getvalue()).decode()]
    for row in bad:
        with pytest.raises(ValueError, match="row 1"):
            encode.images(backbone, one, [row])
    with Engine(backbone) as engine:
        with pytest.raises(ValueError, match="head"):
            engine.add("bare", prompt)
        engine._served["p"] = one
        request = engine.classify("p", [text])[0]
        assert sum(torch.tensor(request.result(30.0).scores).exp().tolist()) == pytest.approx(1)
