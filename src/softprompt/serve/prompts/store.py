"""A prompt that is sent: its header is checked against the backbone before a tensor is made of it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from softprompt import files
from softprompt.backbones import Backbone
from softprompt.prompts import Folded
from softprompt.serve.prompts.entry import called, checked_name

_TENSOR = "prompt_embeddings"
_FILE = "adapter_model.safetensors"
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100_000
_MAX_LENGTH = 4096


def read_prompt_bytes(content: bytes, backbone: Backbone) -> Folded:
    """The prompt in a PEFT prompt-tuning file (`adapter_model.safetensors`); nothing in it can run.

    Raises:
        ValueError: it is cut off, or holds other things than one prompt as wide as the backbone's embeddings.
    """
    header = _header(content)
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    if set(tensors) != {_TENSOR}:
        raise ValueError(f"the file holds {sorted(tensors)[:5]}; a plain PEFT prompt holds {_TENSOR} alone")
    facts = tensors[_TENSOR]
    kind, shape, offsets = (facts.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in _SIZES:
        raise ValueError(f"the prompt's dtype is {str(kind)[:20]!r}; send {', '.join(_SIZES)}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)):
        raise ValueError(f"the prompt's shape is {str(shape)[:80]}; it must be [length, {backbone.dim}]")
    if not 1 <= shape[0] <= _MAX_LENGTH or shape[1] != backbone.dim:
        raise ValueError(
            f"the prompt's shape is {shape}; {called(backbone)} takes from 1 to {_MAX_LENGTH} rows of {backbone.dim}"
        )
    size = shape[0] * shape[1] * _SIZES[kind]
    if offsets != [0, size] or len(content) != 8 + int.from_bytes(content[:8], "little") + size:
        raise ValueError("the file is not as long as its header says; it is cut off or damaged, send all of it")
    try:
        matrix = load_tensors(content)[_TENSOR].float()
    except SafetensorError as error:  # what JSON takes and the format does not
        raise ValueError(f"the file is no safetensors file ({error}); it is damaged, send it anew") from error
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the prompt holds NaN or infinity; train it again")
    return Folded(matrix)


def _header(content: bytes) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= size <= min(_MAX_HEADER, len(content) - 8):
        raise ValueError("this is no whole safetensors file; send adapter_model.safetensors as the request's body")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise ValueError("the header of the safetensors file is no JSON; it is damaged, send it anew") from error
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError("the header of the safetensors file is no table of tensors; it is damaged, send it anew")
    return header


@final
class PromptStore:
    """The folder that keeps prompts which are sent, so that they are served again after a restart.

    Args:
        shared: several processes serve it, so that only what lies in it can be removed.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self._shared = folder.expanduser(), shared
        self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Every folder in it that holds a prompt or a run; what it is called is not checked."""
        return [
            path.name
            for path in sorted(self.folder.iterdir())
            if path.is_dir() and not path.name.startswith(".") and any(path.glob("*.safetensors"))
        ]

    def path(self, name: str) -> Path:
        """Where the prompt of that name is; never outside the folder."""
        return self.folder / checked_name(name)

    @contextmanager
    def keeping(self, name: str, content: bytes, *, replace: bool = True) -> Iterator[None]:
        """Keep the file, if the block ends well; else nothing has changed.

        Args:
            replace: in place of one of that name.

        Raises:
            FileExistsError: there is one, which another process may have put there.
            PermissionError: the name is a run's folder, or a link.
        """
        place = self.path(name)
        self._refuse_link(place)
        if place.is_dir() and not _ours(place):
            raise PermissionError(f"{name} is a run's folder and not ours to change; choose another name")
        if not replace and (place / _FILE).exists():
            raise FileExistsError(f"the prompt name {name!r} is taken; choose another, or replace it")
        fresh = not place.is_dir()
        try:
            with files.atomic_write(place / _FILE) as draft:
                draft.write_bytes(content)
                yield
        except BaseException:
            if fresh:
                with suppress(OSError):  # another copy's prompt is there meanwhile
                    place.rmdir()
            raise

    def drop(self, name: str) -> None:
        """Forget the prompt.

        Raises:
            PermissionError: it is a run's folder, a link, or (of several processes) not in the folder.
        """
        place = self.path(name)
        self._refuse_link(place)
        if place.is_dir():
            if not _ours(place):
                raise PermissionError(f"{name} is a run's folder and not ours to remove; take the folder away")
            shutil.rmtree(place)
        elif self._shared:
            raise PermissionError(
                f"{name} was given when the service started, and every copy serves it; restart without it"
            )

    def _refuse_link(self, place: Path) -> None:
        if place.is_symlink():
            raise PermissionError(f"{place.name} is a link out of the prompts' folder and not ours to change")


def _ours(place: Path) -> bool:
    """Whether the folder holds nothing but a prompt that was sent, and drafts that a killed process left."""
    return all(file.name == _FILE or file.name.startswith(f".{_FILE}.") for file in place.iterdir())
