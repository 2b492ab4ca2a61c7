"""Files that are written whole or not at all (a temporary name, fsync, rename), and read without running any code."""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

_NO_PLACE = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft's path beside `path`; it takes `path`'s place when the block ends well, else it is removed.

    The draft may become a file or a folder. A folder replaces only a place where there is none, or an empty one.

    Raises:
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield draft
        for file in [draft, *draft.rglob("*")] if draft.is_dir() else [draft]:
            _sync(file)
        draft.replace(path)
        _sync(path.parent)
    except BaseException as error:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise OSError(f"{path} cannot be written ({error.strerror}); make room on its disk") from error
        if isinstance(error, OSError) and error.errno in _NO_PLACE:
            raise OSError(f"{path} cannot be written ({error.strerror}); choose another place") from error
        raise


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """A folder that was made just now goes again where the block does not end well."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on `folder` at the same time.

    Raises:
        RuntimeError: another process is at it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder} is being worked on by another process; wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """`text` as the whole content of `path`, at once."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, at once."""
    with replacing(path) as draft:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, draft, metadata={"format": "pt"})
        except SafetensorError as error:  # what safetensors makes of an OSError, its number lost
            raise OSError(f"{path} cannot be written ({error}); make room on its disk, or choose another") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; nothing it holds can run.

    Raises:
        FileNotFoundError, ValueError: it is not there, or it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; the run is damaged, train again")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); it is damaged, train again") from error


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Put `tensors` into `module`, a prompt, its head or both.

    Raises:
        ValueError: other names or shapes than the module's, or values that are not finite.
    """
    own = module.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{source} holds {shapes}, not the tensors of its own experiment; it was swapped or damaged")
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{source} holds NaN or infinity in {', '.join(bad)}; it is damaged, train again")
    module.load_state_dict(dict(tensors))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it is not there, no JSON or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); it is damaged, train again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; it is damaged, train again")
    return values
