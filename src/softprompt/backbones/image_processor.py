"""Image preprocessing: read, resize and crop to a square, and normalize as the backbone was trained."""

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

from softprompt.files import error_text
from softprompt.types import Augment

Cell = str | Mapping[str, Any]
"""An image in a row: a path, or `{"bytes": ..., "path": ...}`, the undecoded form of `datasets`."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BICUBIC = 3
_CROP_AREA, _CROP_ASPECT_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""The ranges of a random crop, as in Szegedy et al. 2015."""


@final
@dataclass(frozen=True, kw_only=True)
class Processor:
    """The settings of a checkpoint's `preprocessor_config.json`, for square images."""

    size: int
    """The default image size: the side in pixels."""
    mean: tuple[float, float, float]
    """Mean of each channel, for values from 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation of each channel."""
    resample: int = _BICUBIC
    """Pillow's number for the resampling filter."""
    resize_ratio: float = 1.0
    """An image is resized to `resize_ratio * size` before the center crop."""
    keep_aspect_ratio: bool = False
    """Resize the shorter side to that size and keep the aspect ratio; otherwise resize both sides to it."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the image size is {self.size} pixels; give at least the side of one patch")

    def pixels(self, image: Any, size: int, augment: Augment = "none") -> Float[Tensor, "channel height width"]:
        """A Pillow image as normalized pixels of a square; `augment` draws from torch's global generator."""
        square = self._center_crop(image, size) if augment == "none" else self._random_crop(image, size)
        values = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 255
        if augment == "crop+flip" and bool(torch.rand(()) < 0.5):
            values = values.flip(2)
        mean, std = (torch.tensor(channels)[:, None, None] for channels in (self.mean, self.std))
        return ((values - mean) / std).contiguous()

    def _center_crop(self, image: Any, size: int) -> Any:
        resized = max(round(self.resize_ratio * size), size)
        width = height = resized
        if self.keep_aspect_ratio:  # round the longer side down, as transformers does
            width, height = (side * resized // min(image.size) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        return image.resize((width, height), self.resample).crop((left, top, left + size, top + size))

    def _random_crop(self, image: Any, size: int) -> Any:
        area = image.width * image.height * float(torch.empty(()).uniform_(*_CROP_AREA))
        low, high = (float(np.log(bound)) for bound in _CROP_ASPECT_RATIO)
        aspect = float(torch.empty(()).uniform_(low, high).exp())
        width = min(max(round((area * aspect) ** 0.5), 1), image.width)
        height = min(max(round((area / aspect) ** 0.5), 1), image.height)
        left = int(torch.randint(image.width - width + 1, ()))
        top = int(torch.randint(image.height - height + 1, ()))
        return image.resize((size, size), self.resample, box=(left, top, left + width, top + height))


@final
@dataclass(frozen=True)
class Picture:
    """The image of a row, decoded at each access so that memory does not limit the number of images."""

    cell: Cell
    processor: Processor
    size: int
    where: str
    """The row's name in error messages."""
    augment: Augment = "none"

    def pixels(self) -> Float[Tensor, "channel height width"]:
        """The preprocessed image; raises as `read` does."""
        return self.processor.pixels(read(self.cell, self.where), self.size, self.augment)

    def augmented(self, augment: Augment) -> "Picture":
        """The same image with random augmentation at each access."""
        return dataclasses.replace(self, augment=augment)


def name(cell: Any) -> str:
    """An image's name in messages: its path, or a phrase if it has none; empty if there is no image.

    Raises:
        ValueError: the cell is of another type.
    """
    if cell is None or isinstance(cell, str):
        return cell or ""
    if not isinstance(cell, Mapping) or not {"bytes", "path"} & cell.keys():
        raise ValueError(f"a cell holds a {type(cell).__name__}; an image is a path, or its bytes as datasets has them")
    return str(cell.get("path") or ("an image without a path" if cell.get("bytes") else ""))


def read(cell: Cell, where: str = "the row", *, rough: bool = False) -> Any:
    """Read an image as RGB, rotated upright.

    Args:
        cell: the path, or the bytes.
        where: the row's name in error messages.
        rough: only check that it can be read; a JPEG is decoded at an eighth of its size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, or is truncated.
        ModuleNotFoundError: the extra `vision` is not installed.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError(
            "images need the extra `vision`; install it in softprompt's clone with: pip install '.[vision]'"
        )
    from PIL import Image, ImageOps

    decoding_errors = (
        OSError,
        ValueError,
        SyntaxError,
        struct.error,
        EOFError,
        IndexError,
        Image.DecompressionBombError,
    )
    content = _content(cell, where)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if rough:
                image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            return _to_rgb(ImageOps.exif_transpose(image), str(image.format))
    except decoding_errors as error:
        # Pillow's message would name an object in memory.
        unidentified = "cannot identify" in str(error)
        reason = "it is not an image of a known kind" if unidentified else error_text(error)
        raise ValueError(
            f"{where} has the image {name(cell)!r}, which cannot be read ({reason}); repair it or take it out, or "
            'write broken = "skip" into the task\'s .toml file'
        ) from None


def _to_rgb(image: Any, image_format: str) -> Any:
    """Convert to 8-bit RGB; transparency is put on white, as in transformers' own processors.

    Raises:
        ValueError: the pixels are 32-bit numbers of unknown range.
    """
    from PIL import Image

    # 16-bit pixels (mode I in some formats): Pillow's own conversion would clip every value above 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image_format in ("PNG", "PPM")):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers, but nothing says which of them is white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def digest(cell: Cell) -> str:
    """sha256 of the image's bytes."""
    return hashlib.sha256(_content(cell, "the row")).hexdigest()


def _content(cell: Cell, where: str) -> bytes:
    if not isinstance(cell, str) and cell.get("bytes"):
        return bytes(cell["bytes"])
    file = Path(name(cell)).expanduser()
    if not name(cell) or not file.is_file():
        raise FileNotFoundError(f"{where} has the image {name(cell)!r}, but there is no such file; correct the path")
    return file.read_bytes()


def load_processor(folder: str, config: Any) -> Processor:
    """The processor of the checkpoint in `folder` (or of that Hub id).

    Without a `preprocessor_config.json`, images are resized to a square without a crop, and normalized by ImageNet's
    mean and standard deviation, or by 0.5 for a plain ViT.

    Args:
        folder: the folder with `preprocessor_config.json`, or a Hub id.
        config: the model's config.
    """
    settings: Mapping[str, Any] = {}
    if not Path(folder).is_dir():
        with suppress(OSError):  # the Hub has none
            settings = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    elif (Path(folder) / "preprocessor_config.json").is_file():
        settings = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    return processor_from_settings(settings, config)


def processor_from_settings(settings: Mapping[str, Any], config: Any) -> Processor:
    """The processor that the settings of a `preprocessor_config.json` describe."""
    side = config.image_size if isinstance(config.image_size, int) else int(config.image_size[0])
    mean, std = _HALF if config.model_type == "vit" else _IMAGENET
    if not settings:
        return Processor(size=side, mean=mean, std=std)
    size, crop_size = settings.get("size"), settings.get("crop_size")
    resized = _side(size) or side
    cropped = (_side(crop_size) if settings.get("do_center_crop") else None) or resized
    normalize = settings.get("do_normalize", True)
    return Processor(
        size=cropped,
        mean=_rgb(settings.get("image_mean", mean)) if normalize else (0.0, 0.0, 0.0),
        std=_rgb(settings.get("image_std", std)) if normalize else (1.0, 1.0, 1.0),
        resample=int(settings.get("resample", _BICUBIC)),
        resize_ratio=resized / cropped,
        keep_aspect_ratio=isinstance(size, Mapping) and not size.get("height") and bool(size.get("shortest_edge")),
    )


def _side(size: Any) -> int | None:
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    return None if size is None else int(size)


def _rgb(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
