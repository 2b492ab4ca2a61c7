"""Backbones with trained heads: rows of several prompts share a pass, each through its own prompt's head."""

import base64
import io
import struct
import zlib
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


def entry_of(name: str, prompt: SoftPrompt, backbone: Backbone, classes: int, seed: int, **more: Any) -> PromptEntry:
    candidates = tuple((index,) for index in range(classes))
    head = fresh_head(backbone, classes, torch.Generator().manual_seed(seed))
    return PromptEntry(name=name, prompt=prompt.fold(), source="run", candidates=candidates, head=head, **more)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_texts_with_heads_of_different_sizes(name: str, tiny_backbone: MakeBackbone, prompt_of: PromptOf) -> None:
    backbone = tiny_backbone(name)
    entries = [entry_of(f"p{seed}", prompt_of(backbone, seed), backbone, 2 + seed, seed) for seed in range(3)]
    rows = [[0, 40, 41, 1], [0, 50, 1], [0, 60, 61, 62, 63, 1], [0, 70, 1]]
    requests = [
        EngineRequest(entries[i % 3], ids, ClassifyParams(candidates=entries[i % 3].candidates))
        for i, ids in enumerate(rows)
    ]
    for request, ours in zip(requests, GeneralScorer(backbone)(requests), strict=True):
        entry = request.entry
        alone = attach(backbone, entry.prompt, head=entry.head).score(
            torch.tensor([request.ids]), None, entry.candidates
        )
        assert ours == pytest.approx(alone[0].tolist(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_with_prompts_for_different_numbers_of_layers(name: str, tiny_backbone: MakeBackbone) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    backbone = tiny_backbone(name).with_sample_images(images)
    entries = []
    for seed, num_layers in enumerate((1, 2, 1)):
        config = METHODS["plain"](length=2 + seed)
        prompt = build(config, backbone.hosts(num_layers), torch.Generator().manual_seed(seed))
        entries.append(entry_of(f"p{seed}", prompt, backbone, 2 + seed, seed))
    requests = [
        EngineRequest(entries[i % 3], (), ClassifyParams(candidates=entries[i % 3].candidates), pixels=image)
        for i, image in enumerate(images)
    ]
    for request, ours, image in zip(requests, GeneralScorer(backbone)(requests), images, strict=True):
        entry = request.entry
        alone = attach(backbone, entry.prompt, head=entry.head).score(image[None], None, entry.candidates)
        assert ours == pytest.approx(alone[0].tolist(), abs=1e-5)


def _png(width: int, height: int) -> bytes:
    """The start of a file of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def test_image_is_sent_content_and_never_a_local_path(tiny_backbone: MakeBackbone, tmp_path: Path) -> None:
    backbone = tiny_backbone("vit")
    file = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 80).convert("RGB").save(file)
    task = Task(name="photos", image="image", label="label", label_words={"a": "a", "b": "b"})
    prompt = METHODS["plain"](length=2).build(backbone.host(), torch.Generator())
    entry = entry_of("p", prompt, backbone, 2, 0, task=task, max_input_tokens=32)
    expected = Picture(str(file), backbone.tokenizer, 32, "row 1").pixels()
    text = base64.b64encode(file.read_bytes()).decode()
    for row in (text, f"data:image/png;base64,{text}", {"image": text}, {"image": file.read_bytes()}):
        assert torch.equal(encode.images(backbone, entry, [row])[0], expected)
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    with pytest.raises(ValueError, match=r"row 1 has an image that is too large .*; send at most 40000000 pixels"):
        encode.images(backbone, entry, [{"image": _png(20_000, 20_000)}])
    bad = [str(file), {"image": str(file)}, {"other": text}, "", text[:40], base64.b64encode(huge.getvalue()).decode()]
    for row in bad:
        with pytest.raises(ValueError, match="row 1"):
            encode.images(backbone, entry, [row])
    with Engine(backbone) as engine:
        with pytest.raises(ValueError, match="head"):
            engine.add("bare", prompt)
        engine._entries["p"] = entry
        request = engine.classify("p", [text])[0]
        assert sum(torch.tensor(request.result(30.0).logprobs).exp().tolist()) == pytest.approx(1)
