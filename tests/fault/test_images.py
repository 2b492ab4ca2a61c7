"""Faulty images are refused in one sentence, before anything is trained or written."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from softprompt import Backbone, Experiment, Plain, TrainingConfig, load_backbone, train
from softprompt.backbones.image_processor import Processor, processor_from_settings, read
from softprompt.tasks import Task
from softprompt.tasks.data.splits import splits
from softprompt.tasks.data.tokenize import encode
from softprompt.tasks.user import load_task

MakeBackbone = Callable[[str], Backbone]


def image_bytes(kind: str = "png", size: tuple[int, int] = (20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten images."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "photos" / name / f"{number}.png").write_bytes(image_bytes())
    return tmp_path / "photos"


def toml(folder: Path, **settings: str) -> str:
    file = folder / "pets.toml"
    file.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    return str(file)


BROKEN = {
    "empty": b"",
    "text": b"this is no image",
    "cut png": image_bytes()[:200],
    "cut jpeg": image_bytes("jpeg", (300, 300))[:4000],
    "html": b"<html><body>404</body></html>",
}
broken = pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())


@broken
def test_broken_image_is_named(content: bytes, photos: Path) -> None:
    (photos / "dog" / "3.png").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"row 14 of .*photos has the image '.*dog/3.png', which cannot be read"
    ) as caught:
        splits(load_task(str(photos)))
    assert 'write broken = "skip"' in str(caught.value)
    assert "object at 0x" not in str(caught.value)


@broken
def test_broken_image_can_be_skipped(content: bytes, photos: Path, tmp_path: Path) -> None:
    (photos / "dog" / "3.png").write_bytes(content)
    rows = splits(load_task(toml(tmp_path, train="photos", image="image", label="label", broken="skip")))
    assert sum(map(len, (rows.train, rows.dev, rows.test))) == 19
    assert len(rows.broken) == 1
    assert rows.broken[0].endswith("dog/3.png")
    assert any("1 broken images were left out" in warning and "dog/3.png" in warning for warning in rows.warnings)


def test_only_broken_images_are_refused(photos: Path, tmp_path: Path) -> None:
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no")
    with pytest.raises(ValueError, match="none of the 20 images of"):
        splits(load_task(toml(tmp_path, train="photos", image="image", label="label", broken="skip")))


def test_file_that_is_not_an_image_counts_as_broken(photos: Path) -> None:
    (photos / "cat" / "notes.txt").write_text("cats")
    (photos / "cat" / ".DS_Store").write_bytes(b"hidden files are")
    with pytest.raises(ValueError, match=r"notes.txt', which cannot be read"):
        splits(load_task(str(photos)))


def test_image_lost_during_training_is_named(photos: Path) -> None:
    task, processor = load_task(str(photos)), Processor(size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    [example] = encode(task, processor, [{"image": str(photos / "cat" / "1.png")}], 16, answers=False)[0]
    assert example.picture is not None
    assert example.picture.pixels().shape == (3, 16, 16)
    (photos / "cat" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"row 1 has the image '.*1.png', but there is no such file"):
        example.picture.pixels()


def test_fingerprint_follows_content_not_path(photos: Path, tmp_path: Path) -> None:
    first = splits(load_task(str(photos))).fingerprint
    moved = photos.rename(tmp_path / "elsewhere")
    assert splits(load_task(str(moved))).fingerprint == first
    (moved / "cat" / "0.png").write_bytes(image_bytes())
    assert splits(load_task(str(moved))).fingerprint != first


def test_invalid_image_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none has no folders; give each class a folder"):
        load_task(str(tmp_path / "none"))
    (tmp_path / "none" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"has 1 classes \(cat\); there must be two or more"):
        load_task(str(tmp_path / "none"))
    (photos / "bird").mkdir()
    with pytest.raises(ValueError, match=r"the class folder 'bird' of .*photos has no files"):
        splits(load_task(str(photos)))


def test_table_of_paths_is_relative_to_its_folder(photos: Path, tmp_path: Path) -> None:
    names = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(10)]
    lines = ["file,kind", *(f"photos/{name},{name[:3]}" for name in names)]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    file = toml(tmp_path, train="list.csv", image="file", label="kind")
    rows = splits(load_task(file))
    assert [len(part) for part in (rows.train, rows.dev, rows.test)] == [14, 2, 4]
    assert load_task(file).label_words == {"cat": "cat", "dog": "dog"}
    (tmp_path / "list.csv").write_text("\n".join([*lines, "photos/cat/99.png,cat"]) + "\n")
    with pytest.raises(FileNotFoundError, match=r"row 21 of .*list.csv has the image '.*99.png', but there is no such"):
        splits(load_task(file))
    with pytest.raises(ValueError, match="has no column 'picture'"):
        splits(load_task(toml(tmp_path, train="list.csv", image="picture", label="kind")))


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [(("train",), (14, 2, 4)), (("train", "val"), (20, 10, 10)), (("train", "valid", "test"), (20, 20, 20))],
)
def test_split_folders_are_kept(parts: tuple[str, ...], sizes: tuple[int, ...], photos: Path, tmp_path: Path) -> None:
    for part in parts:
        for file in photos.rglob("*.png"):
            inner = tmp_path / "cut" / part / file.parent.name
            inner.mkdir(parents=True, exist_ok=True)
            (inner / file.name).write_bytes(image_bytes())
    rows = splits(load_task(str(tmp_path / "cut")))
    assert tuple(len(part) for part in (rows.train, rows.dev, rows.test)) == sizes
    seen = [set(part["image"]) for part in (rows.train, rows.dev, rows.test)]
    assert not seen[0] & seen[1] | seen[0] & seen[2] | seen[1] & seen[2]


def test_two_folders_for_one_split_are_refused(photos: Path, tmp_path: Path) -> None:
    for part in ("train", "val", "dev"):
        shutil.copytree(photos, tmp_path / "cut" / part)
    with pytest.raises(ValueError, match="cut has both 'dev' and 'val', which mean the same"):
        load_task(str(tmp_path / "cut"))


def test_hub_dataset_is_read_by_name(tmp_path: Path, tiny_backbone: MakeBackbone) -> None:
    """A repository in a folder of Parquet files, as the hub keeps one."""
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])})
    cells = {"img": [{"bytes": image_bytes(), "path": None} for _ in range(20)], "kind": [0, 1] * 10}
    (tmp_path / "repository").mkdir()
    datasets.Dataset.from_dict(cells, features=features).to_parquet(tmp_path / "repository" / "train.parquet")
    task = load_task(toml(tmp_path, hub=str(tmp_path / "repository"), image="img", label="kind"))
    assert list(task.label_words) == ["dog", "cat"]
    rows = splits(task)
    assert [len(part) for part in (rows.train, rows.dev, rows.test)] == [14, 2, 4]
    examples, _ = encode(task, tiny_backbone("vit").tokenizer, rows.train, 32)
    assert [example.label for example in examples] == [
        list(task.label_words).index(kind) for kind in rows.train["kind"]
    ]
    assert examples[0].picture is not None
    assert examples[0].picture.pixels().shape == (3, 32, 32)
    hidden = {**cells, "kind": [-1] * 20}
    datasets.Dataset.from_dict(hidden, features=features).to_parquet(tmp_path / "repository" / "test.parquet")
    assert [len(part) for part in (splits(task).train, splits(task).test)] == [14, 4], "hidden labels score nothing"
    some = {**cells, "kind": [0] * 19 + [-1]}
    datasets.Dataset.from_dict(some, features=features).to_parquet(tmp_path / "repository" / "test.parquet")
    with pytest.raises(ValueError, match=r"row 20 of split test of .*repository has no label"):
        splits(task)
    with pytest.raises(FileNotFoundError, match="the dataset 'no/where' cannot be loaded"):
        load_task(toml(tmp_path, hub="no/where", image="img", label="kind"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "{x}"}, "has the template '{x}'"),
        ({"label": "", "label_words": {}, "target": "t", "metrics": ("exact_match",)}, "has no label"),
        ({"broken": "ignore"}, "it must be 'refuse' or 'skip'"),
    ],
)
def test_invalid_image_task_is_refused(settings: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        Task(**{"name": "x", "image": "i", "label": "y", "label_words": {"a": "a", "b": "b"}, **settings})


def test_image_task_with_text_backbone_is_refused(
    photos: Path, llama_folder: Path, tmp_path: Path, ticket_task: Path
) -> None:
    small = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    transformers.ViTModel(small).save_pretrained(tmp_path / "vit")
    vision = Experiment(backbone=str(tmp_path / "vit"), task=str(photos), prompt=Plain(length=2), dtype="float32")
    with pytest.raises(ValueError, match="has images, but the backbone reads text"):
        train(vision.replace(backbone=str(llama_folder)), out=tmp_path / "runs")
    with pytest.raises(ValueError, match="has text, but the backbone reads images"):
        train(vision.replace(task=str(ticket_task)), out=tmp_path / "runs")
    with pytest.raises(ValueError, match=r"pool is for images, but .* reads text"):
        train(vision.replace(backbone=str(llama_folder), task=str(ticket_task), pool="patches"), out=tmp_path / "runs")
    with pytest.raises(
        ValueError, match=r"an image of 20 x 20 pixels is not a whole number of patches of 8; give .* 16"
    ):
        train(vision.replace(training=TrainingConfig(steps=1, image_size=20)), out=tmp_path / "runs")
    with pytest.raises(ValueError, match="the initial text is 'cats', but a vision model takes no text"):
        train(vision.replace(prompt=Plain(length=2, init="text", init_text="cats")), out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    # Loaded twice it is the same, though its checkpoint has no pooler.
    assert load_backbone(str(tmp_path / "vit")).hash == load_backbone(str(tmp_path / "vit")).hash


def saved(image: Any, kind: str = "png", **settings: Any) -> Any:
    """The cell of an image, and the image as it is read."""
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return read({"bytes": stream.getvalue(), "path": None})


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "1"])
def test_every_pixel_format_is_read(mode: str) -> None:
    color = (255, 255, 255) if mode == "1" else (90, 90, 90) if mode in ("L", "LA") else (255, 0, 0)
    image = Image.new("RGB", (9, 7), color).convert(mode)
    result = saved(image, "tiff" if mode == "CMYK" else "png")
    assert (result.mode, result.size) == ("RGB", (9, 7))
    assert (np.asarray(result) == color).all()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bit_pixels_are_scaled(kind: str) -> None:
    """Gray from black to white; Pillow's own conversion makes all but the darkest white."""
    gray = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    result = np.asarray(saved(Image.fromarray(gray), kind))
    assert (result == np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="cannot be read \\(its pixels are 32-bit numbers, but nothing says which"):
        saved(Image.fromarray(np.ones((4, 4), dtype)), "tiff")


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(kind: str) -> None:
    """As transformers' processors have it; under an unseen pixel there may be any color."""
    image = Image.new("RGBA", (4, 1), (200, 200, 200, 255))
    image.putpixel((0, 0), (10, 10, 10, 0))
    image.putpixel((1, 0), (10, 10, 10, 128))
    if kind == "P":  # the palette's first entry is not to be seen
        image = Image.new("P", (4, 1), 1)
        image.putpalette([10, 10, 10, 200, 200, 200])
        image.putpixel((0, 0), 0)
    result = saved(image if kind == "P" else image.convert(kind), **({"transparency": 0} if kind == "P" else {}))
    half = (200,) * 3 if kind == "P" else (132,) * 3
    assert [result.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, half, (200,) * 3]


def test_animated_image_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 5), color) for color in ("red", "blue")]
    assert saved(frames[0], "gif", save_all=True, append_images=frames[1:]).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 40), (40, 3)])
def test_tiny_jpeg_is_read(size: tuple[int, int]) -> None:
    assert read({"bytes": image_bytes("jpeg", size), "path": None}, rough=True).mode == "RGB"


def test_photo_is_rotated_upright() -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(stream, "jpeg", exif=exif)
    assert read({"bytes": stream.getvalue(), "path": None}).size == (20, 40)


CROPPED: dict[str, Any] = {"do_center_crop": True, "crop_size": {"height": 24, "width": 24}, "resample": 3}
PROCESSORS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "dinov2": (
        transformers.BitImageProcessorPil,
        transformers.Dinov2Config(image_size=518),
        {**CROPPED, "size": {"shortest_edge": 32}},
    ),
    "deit": (
        transformers.DeiTImageProcessorPil,
        transformers.DeiTConfig(),
        {**CROPPED, "size": {"height": 32, "width": 32}},
    ),
    "old deit": (
        transformers.DeiTImageProcessorPil,
        transformers.DeiTConfig(),
        {**CROPPED, "crop_size": 24, "size": 32},
    ),
    "vit": (
        transformers.ViTImageProcessorPil,
        transformers.ViTConfig(),
        {"size": {"height": 24, "width": 24}, "resample": 2},
    ),
}


@pytest.mark.parametrize("size", [(50, 40), (31, 47), (20, 90), (24, 24)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_follows_the_checkpoint(name: str, size: tuple[int, int]) -> None:
    """Its mean, its deviation, and its cut: what transformers' own processor makes, to the rounding of float32."""
    kind, config, settings = PROCESSORS[name]
    values = {**settings, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    ours = processor_from_settings(values, config)
    assert ours.size == 24
    image = Image.effect_noise(size, 80).convert("RGB")
    theirs = kind(**values)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours.pixels(image, 24), theirs, rtol=0, atol=1e-5)


def test_table_may_have_boolean_labels(photos: Path, tmp_path: Path) -> None:
    names = [f"photos/{kind}/{number}.png" for kind in ("cat", "dog") for number in range(10)]
    lines = [json.dumps({"file": name, "cat": "cat" in name}) for name in names]
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n")
    task = load_task(toml(tmp_path, train="list.jsonl", image="file", label="cat"))
    assert task.label_words == {"false": "false", "true": "true"}
    assert [task.answer(row) for row in splits(task).train][:2] in ([0, 1], [1, 0], [0, 0], [1, 1])
