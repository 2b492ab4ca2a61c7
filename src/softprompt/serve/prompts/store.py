"""Uploaded prompts: validated by their header before any tensor is loaded, and kept in a folder."""

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
from softprompt.serve.prompts.entry import check_prompt_name, display_name

_TENSOR = "prompt_embeddings"
_FILE = "adapter_model.safetensors"
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER = 100_000
_MAX_LENGTH = 4096


def read_prompt_bytes(content: bytes, backbone: Backbone) -> Folded:
    """The prompt in a PEFT prompt-tuning file (`adapter_model.safetensors`); nothing in it can run.

    Raises:
        ValueError: it is damaged, or holds anything but one prompt as wide as the backbone's embeddings.
    """
    header = _header(content)
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    if set(tensors) != {_TENSOR}:
        raise ValueError(f"the file holds {sorted(tensors)[:5]}; a plain PEFT prompt holds {_TENSOR} alone")
    fields = tensors[_TENSOR]
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"the prompt's dtype is {str(dtype)[:20]!r}; it must be {', '.join(_SIZES)}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)):
        raise ValueError(f"the prompt's shape is {str(shape)[:80]}; it must be [length, {backbone.dim}]")
    if not 1 <= shape[0] <= _MAX_LENGTH or shape[1] != backbone.dim:
        raise ValueError(
            f"the prompt's shape is {shape}; {display_name(backbone)} takes 1 to {_MAX_LENGTH} rows of {backbone.dim}"
        )
    size = shape[0] * shape[1] * _SIZES[dtype]
    if offsets != [0, size] or len(content) != 8 + int.from_bytes(content[:8], "little") + size:
        raise ValueError("the file does not have the length that its header states; it is damaged, send it again")
    try:
        matrix = load_tensors(content)[_TENSOR].float()
    except SafetensorError as error:  # valid as JSON but not in this format
        raise ValueError(f"the file is not a safetensors file ({error}); it is damaged, send it again") from error
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("the prompt holds NaN or infinity; train it again")
    return Folded(matrix)


def _header(content: bytes) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= size <= min(_MAX_HEADER, len(content) - 8):
        raise ValueError("the body is not a safetensors file; send adapter_model.safetensors as the request's body")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError) as error:
        raise ValueError("the header of the safetensors file is not JSON; it is damaged, send it again") from error
    if not isinstance(header, dict) or not all(isinstance(value, dict) for value in header.values()):
        raise ValueError("the header of the safetensors file does not describe tensors; it is damaged, send it again")
    return header


@final
class PromptStore:
    """The folder of uploaded prompts, which are served again after a restart.

    Args:
        shared: several processes serve the folder, so only prompts in it can be deleted.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder, self._shared = folder.expanduser(), shared
        self.folder.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Names of the folders in it that hold a prompt or a run; not checked to be valid prompt names."""
        return [
            path.name
            for path in sorted(self.folder.iterdir())
            if path.is_dir() and not path.name.startswith(".") and any(path.glob("*.safetensors"))
        ]

    def path(self, name: str) -> Path:
        """The folder of the prompt of that name; never outside the store."""
        return self.folder / check_prompt_name(name)

    @contextmanager
    def saving(self, name: str, content: bytes, *, replace: bool = True) -> Iterator[None]:
        """Save the file if the block succeeds; otherwise nothing has changed.

        Args:
            replace: overwrite a prompt of that name.

        Raises:
            FileExistsError: the name is taken, perhaps by another process.
            PermissionError: the name is a run's folder, or a link.
        """
        folder = self.path(name)
        self._check_not_link(folder)
        if folder.is_dir() and not _is_upload(folder):
            raise PermissionError(f"{name} is a run's folder, which the service does not change; choose another name")
        if not replace and (folder / _FILE).exists():
            raise FileExistsError(f"the prompt name {name!r} is taken; choose another, or replace it")
        is_new = not folder.is_dir()
        try:
            with files.atomic_write(folder / _FILE) as draft:
                draft.write_bytes(content)
                yield
        except BaseException:
            if is_new:
                with suppress(OSError):  # not empty: another replica has saved a prompt in it meanwhile
                    folder.rmdir()
            raise

    def delete(self, name: str) -> None:
        """Delete the prompt.

        Raises:
            PermissionError: it is a run's folder or a link or, in a shared store, not in the store.
        """
        folder = self.path(name)
        self._check_not_link(folder)
        if folder.is_dir():
            if not _is_upload(folder):
                raise PermissionError(f"{name} is a run's folder, which the service does not delete; remove it by hand")
            shutil.rmtree(folder)
        elif self._shared:
            raise PermissionError(
                f"{name} was given when the service started, and every replica serves it; restart without it"
            )

    def _check_not_link(self, folder: Path) -> None:
        if folder.is_symlink():
            raise PermissionError(f"{folder.name} is a link, which the service does not change; choose another name")


def _is_upload(folder: Path) -> bool:
    """Whether the folder holds only an uploaded prompt, and drafts left by killed processes."""
    return all(file.name == _FILE or file.name.startswith(f".{_FILE}.") for file in folder.iterdir())
