"""Files that are written whole or not at all (a temporary name, fsync, rename), and read without running any code."""

import errno
import fcntl
import json
import os
import pickle
import shutil
import threading
import unicodedata
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
_LONGEST = 255
"""Bytes that a file system gives a name."""
LONGEST_NAME = 200
"""Bytes that a name may have which a user chooses: the rest is for what we put behind it (`-2`, `-peft`, `.f32`)."""
_RESERVED = {"con", "prn", "aux", "nul", *(f"{kind}{digit}" for kind in ("com", "lpt") for digit in "0123456789¹²³")}
"""Devices of Windows, with any ending."""
_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
"""Signs that nobody sees and that show a name as another one."""


def check_name(name: str, what: str) -> str:
    """`name`, if a folder can be called that on every system that a run may be copied to; letters of any alphabet.

    Args:
        what: what has the name, for the message: `run name`.

    Raises:
        ValueError: it is none, is a path, is hidden, is reserved, has signs that cannot be seen, or is too long.
    """
    if reason := _name_fault(name):
        raise ValueError(f"{what} {name[:60]!r} is no plain folder name: {reason}; choose another name")
    return name


def _name_fault(name: str) -> str:
    if not name:
        return "it is empty"
    if name.startswith("."):
        return "it begins with a dot"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if bad := sorted(set(name) & set('/\\<>:"|?*')):
        return f"it has {bad[0]!r} in it"
    if bad := [sign for sign in name if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or sign in _DIRECTIONS]:
        return f"it has {bad[0]!a} in it, which cannot be seen"
    if name.split(".")[0].rstrip().lower() in _RESERVED:
        return "it is the name of a device on some systems"
    if (size := len(name.encode())) > LONGEST_NAME:
        return f"it has {size} bytes in UTF-8, of at most {LONGEST_NAME}"
    return ""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A draft's path beside `path`; it takes `path`'s place when the block ends well, else it is removed.

    The draft may become a file or a folder. A folder replaces only a place where there is none, or an empty one. Who
    may read its files is as for any new file of this process, whatever wrote them.

    Raises:
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(_draft_name(path.name))
    try:
        yield draft
        mode = _usual_mode(draft.with_name(_draft_name(path.name, "-mode")))
        for file in [draft, *draft.rglob("*")] if draft.is_dir() else [draft]:
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
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


def _draft_name(name: str, ending: str = "") -> str:
    """Hidden, of this thread alone, and no longer than a file system allows."""
    ending = f".{os.getpid()}-{threading.get_ident()}{ending}"
    room = _LONGEST - len(ending) - 1
    return "." + os.fsencode(name)[:room].decode(errors="ignore") + ending


def _usual_mode(probe: Path) -> int:
    """The mode of a new file in this place: safetensors makes files that their owner alone may read.

    Asked of the system with a file: reading the umask means changing it, also for other threads.
    """
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` as the whole content of `path`, at once."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, at once."""
    with atomic_write(path) as draft:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, draft, metadata={"format": "pt"})
        except SafetensorError as error:  # what safetensors makes of an OSError, its number lost
            raise OSError(f"{path} cannot be written ({error}); make room on its disk, or choose another") from error


RETRAIN = "the run is damaged: copy its folder again, or train again"
"""What to do about a bad file of a run; files of other origin have other advice."""


ADAPTER = "save the adapter again, or fetch it again"
"""The same about a file of other software's adapter."""


def read_tensors(file: Path, advice: str = RETRAIN) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; nothing it holds can run.

    Args:
        advice: what to do where it cannot be read, which depends on where it is from.

    Raises:
        FileNotFoundError, ValueError: it is not there, or it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; {advice}")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}); {advice}") from error


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's folder: `adapter_model.safetensors`, else `adapter_model.bin`, read as data alone.

    Raises:
        FileNotFoundError, ValueError: neither is there, or it is damaged, or it holds anything but tensors.
    """
    pickled = folder / "adapter_model.bin"
    if (folder / "adapter_model.safetensors").is_file() or not pickled.is_file():
        return read_tensors(folder / "adapter_model.safetensors", ADAPTER)
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{pickled} is damaged, or holds more than tensors, of which nothing is run; {ADAPTER}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(one, torch.Tensor) for one in tensors.values()):
        raise ValueError(f"{pickled} holds no tensors by name; it is no adapter")
    return tensors


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


def read_json(path: Path, advice: str = RETRAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        advice: as of `read_tensors`.

    Raises:
        FileNotFoundError, ValueError: it is not there, or it is no JSON or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; {advice}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; {advice}")
    return values
