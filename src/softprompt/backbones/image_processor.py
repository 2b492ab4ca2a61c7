"""How an image becomes numbers: read, made a square, and normalised as the backbone was trained to see it."""

import dataclasses
import hashlib
import importlib.util
import io
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ImageProcessingMixin

from softprompt.types import Augment

Cell = str | Mapping[str, Any]
"""An image in a row: a path, or `{"bytes": ..., "path": ...}` as `datasets` keeps one that is not decoded."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BICUBIC = 3
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
"""Of a random crop, as Szegedy et al. 2015 draw it."""


@final
@dataclass(frozen=True, kw_only=True)
class Processor:
    """What a checkpoint's `preprocessor_config.json` says, for square images."""

    size: int
    """Side in pixels where nobody asks for another."""
    mean: tuple[float, float, float]
    """Of each channel, taken off values from 0 to 1."""
    deviation: tuple[float, float, float]
    """Of each channel, divided by."""
    resample: int = _BICUBIC
    """Pillow's number of the filter."""
    margin: float = 1.0
    """An image is resized to `margin * size`, and the middle is cut out."""
    proportional: bool = False
    """It keeps its proportions: the shorter side is resized to that, not both."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"an image size of {self.size} pixels cannot be; give at least one patch's")

    def pixels(self, image: Any, size: int, augment: Augment = "none") -> Float[Tensor, "channel height width"]:
        """A Pillow image as a square of `size`; what is random comes from torch's global generator."""
        square = self._middle(image, size) if augment == "none" else self._random(image, size)
        values = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 255
        if augment == "crop+flip" and bool(torch.rand(()) < 0.5):
            values = values.flip(2)
        mean, deviation = (torch.tensor(part)[:, None, None] for part in (self.mean, self.deviation))
        return ((values - mean) / deviation).contiguous()

    def _middle(self, image: Any, size: int) -> Any:
        inner = max(round(self.margin * size), size)
        wide = high = inner
        if self.proportional:  # the longer side rounded down, as transformers does it
            wide, high = (side * inner // min(image.size) for side in image.size)
        left, top = (wide - size) // 2, (high - size) // 2
        return image.resize((wide, high), self.resample).crop((left, top, left + size, top + size))

    def _random(self, image: Any, size: int) -> Any:
        area = image.width * image.height * float(torch.empty(()).uniform_(*_AREA))
        low, high = (float(np.log(bound)) for bound in _ASPECT)
        aspect = float(torch.empty(()).uniform_(low, high).exp())
        wide = min(max(round((area * aspect) ** 0.5), 1), image.width)
        tall = min(max(round((area / aspect) ** 0.5), 1), image.height)
        left = int(torch.randint(image.width - wide + 1, ()))
        top = int(torch.randint(image.height - tall + 1, ()))
        return image.resize((size, size), self.resample, box=(left, top, left + wide, top + tall))


@final
@dataclass(frozen=True)
class Picture:
    """An image of a row, decoded whenever it is needed, so that any number of them fits into memory."""

    cell: Cell
    processor: Processor
    size: int
    where: str
    """The row, for an error."""
    augment: Augment = "none"

    def pixels(self) -> Float[Tensor, "channel height width"]:
        """The image as the backbone wants it; raises as `read` does."""
        return self.processor.pixels(read(self.cell, self.where), self.size, self.augment)

    def augmented(self, augment: Augment) -> "Picture":
        """The same, changed at random each time that it is read."""
        return dataclasses.replace(self, augment=augment)


def name(cell: Any) -> str:
    """What an image is called in a message: its path, or that it has none; empty where there is no image.

    Raises:
        ValueError: the cell holds no image at all.
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    if not isinstance(cell, Mapping) or not {"bytes", "path"} & cell.keys():
        raise ValueError(f"a cell holds a {type(cell).__name__}; an image is a path, or its bytes as datasets has them")
    return str(cell.get("path") or ("an image without a path" if cell.get("bytes") else ""))


def read(cell: Cell, where: str = "the row", *, rough: bool = False) -> Any:
    """The image, upright and in three channels.

    Args:
        cell: the path, or the bytes.
        where: names the row in a message.
        rough: enough to know that it can be read; a JPEG is decoded at an eighth of its size.

    Raises:
        FileNotFoundError: there is no file of that path.
        ValueError: the file is no image, or is cut off.
        ModuleNotFoundError: the extra `vision` is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError("images need the extra `vision`; install it with: pip install 'softprompt[vision]'")
    from PIL import Image, ImageOps

    damage = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, Image.DecompressionBombError)
    content = _content(cell, where)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if rough:
                image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            return _three_channels(ImageOps.exif_transpose(image), str(image.format))
    except damage as error:
        # Pillow's own words name an object in memory here.
        known = "cannot identify" not in str(error)
        reason = " ".join(str(error).split()) if known else "it is no image of a known kind"
        raise ValueError(
            f"{where} has the image {name(cell)!r}, which cannot be read ({reason}); repair it or take it out, or "
            'write broken = "skip" into the task\'s .toml file'
        ) from None


def _three_channels(image: Any, kind: str) -> Any:
    """Eight bits each; transparency lies on white, as in transformers' own processors.

    Raises:
        ValueError: the pixels are numbers of which nobody says what white is.
    """
    from PIL import Image

    # Sixteen bits, of which Pillow's own conversion cuts off every value above 255; some kinds have them as mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, and nothing says which of them is white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def digest(cell: Cell) -> str:
    """sha256 of the image's bytes, whatever its file is called."""
    return hashlib.sha256(_content(cell, "the row")).hexdigest()


def _content(cell: Cell, where: str) -> bytes:
    if not isinstance(cell, str) and cell.get("bytes"):
        return bytes(cell["bytes"])
    file = Path(name(cell)).expanduser()
    if not name(cell) or not file.is_file():
        raise FileNotFoundError(f"{where} has the image {name(cell)!r}, and there is no such file; correct the path")
    return file.read_bytes()


def processor(folder: str, config: Any) -> Processor:
    """The processor that the checkpoint in `folder` (or of that hub id) describes.

    A folder of weights alone has none: then images are squared without a cut and normalised by ImageNet's mean and
    deviation, or for a plain ViT by 0.5.

    Args:
        folder: where `preprocessor_config.json` is.
        config: the model's.
    """
    values: Mapping[str, Any] = {}
    place = Path(folder)
    if place.is_dir():
        with_settings = (place / "preprocessor_config.json").is_file()
        values = ImageProcessingMixin.get_image_processor_dict(folder)[0] if with_settings else {}
        return described(values, config)
    with suppress(OSError):  # the hub says that there is none
        values = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    return described(values, config)


def described(values: Mapping[str, Any], config: Any) -> Processor:
    """The processor that the settings of a `preprocessor_config.json` describe."""
    side = config.image_size if isinstance(config.image_size, int) else int(config.image_size[0])
    mean, deviation = _HALVES if config.model_type in ("vit", "vit_mae") else _IMAGENET
    if not values:
        return Processor(size=side, mean=mean, deviation=deviation)
    size, crop = values.get("size"), values.get("crop_size")
    resized = _side(size) or side
    given = (_side(crop) if values.get("do_center_crop") else None) or resized
    normal = values.get("do_normalize", True)
    return Processor(
        size=given,
        mean=_triple(values.get("image_mean", mean)) if normal else (0.0, 0.0, 0.0),
        deviation=_triple(values.get("image_std", deviation)) if normal else (1.0, 1.0, 1.0),
        resample=int(values.get("resample", _BICUBIC)),
        margin=resized / given,
        proportional=isinstance(size, Mapping) and not size.get("height") and bool(size.get("shortest_edge")),
    )


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    return None if size is None else int(size)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
