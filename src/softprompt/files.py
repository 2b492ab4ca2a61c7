"""Atomic file writes (temporary name, fsync, rename), reads that never execute code, and errors on one line."""

import errno
import fcntl
import json
import os
import shutil
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

_NOT_WRITABLE = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_FILE_NAME = 255
"""Bytes that a file system allows for a name."""
MAX_NAME = 200
"""Bytes allowed for a name that the user chooses; the rest is reserved for suffixes (`-2`, `-peft`, `.f32`)."""
_WINDOWS_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{kind}{digit}" for kind in ("com", "lpt") for digit in "0123456789¹²³"),
}
"""Names of Windows devices, reserved with any extension."""
_INVISIBLE = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
"""Invisible characters such as direction marks, which make a name look like another one."""


def error_text(error: BaseException) -> str:
    """The error's message on one line; its class's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: object) -> str:
    """The first line of an error of another library, at most 300 characters; later lines explain its own options."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def is_readable(error: BaseException) -> bool:
    """Whether the error's message alone says to a user what happened."""
    known = isinstance(error, (ValueError, OSError, RuntimeError, ModuleNotFoundError))
    return bool(str(error).strip()) and (known or type(error).__module__.startswith("softprompt"))


def one_line(error: BaseException) -> str:
    """The error's message on one line, after its class's name if the message alone is not meant for users."""
    if is_readable(error):
        return error_text(error)
    return f"{type(error).__name__}: {error_text(error) if str(error).strip() else 'no message'}"


def check_name(name: str, what: str) -> str:
    """Return `name` if every system that a run may be copied to accepts it as a folder name; any alphabet is allowed.

    Args:
        what: what is being named, for the message: `run name`.

    Raises:
        ValueError: the name is empty, a path, hidden, reserved, too long, or has invisible characters.
    """
    if reason := _name_fault(name):
        raise ValueError(f"{what} {name[:60]!r} is not a plain folder name: {reason}; choose another name")
    return name


def _name_fault(name: str) -> str:
    if not name:
        return "it is empty"
    if name.startswith("."):
        return "it begins with a dot"
    if name != name.strip() or name.endswith("."):
        return "it begins or ends with a space, or ends with a dot"
    if bad := sorted(set(name) & set('/\\<>:"|?*')):
        return f"it contains {bad[0]!r}"
    if bad := [char for char in name if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in _INVISIBLE]:
        return f"it contains {bad[0]!a}, which is invisible"
    if name.split(".")[0].rstrip().lower() in _WINDOWS_DEVICES:
        return "it is the name of a device on some systems"
    if (size := len(name.encode())) > MAX_NAME:
        return f"it has {size} bytes in UTF-8, but at most {MAX_NAME} are allowed"
    return ""


def check_output(path: Path, *inputs: Path) -> None:
    """Check, before any work is done, that a file can be written to `path` and is not one of the `inputs`.

    Raises:
        ValueError: it is one of them.
        OSError: it is a folder, or its folder cannot be written.
    """
    path = path.expanduser()
    for source in inputs:
        if path.exists() and source.expanduser().exists() and path.samefile(source.expanduser()):
            raise ValueError(f"{path} is also what is read, and would be replaced; choose another --output")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of a file")
    check_writable(path.parent, "choose another --output")


def check_writable(folder: Path, advice: str) -> None:
    """Check that files can be created in `folder`, which need not exist yet.

    Raises:
        OSError: ending with `advice`.
    """
    existing = folder.expanduser().absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{folder} is not writable ({existing} is not a folder with write permission); {advice}")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a draft next to `path`, which replaces `path` if the block succeeds and is removed otherwise.

    A link stays, and what it points to is replaced. The draft may be a file or a folder. A folder only replaces a path
    that does not exist or is an empty folder. File permissions are those of any new file of this process, whatever
    library wrote the draft.

    Raises:
        OSError: the disk is full, or `path` cannot be written; nothing is left there. Or it is a device or a pipe.
    """
    path = Path(os.path.realpath(path.expanduser()))
    if _is_special(path):
        raise OSError(f"{path} is a device or a pipe, which a file cannot replace; give the path of a file")
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
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise OSError(f"{path} cannot be written ({error.strerror}); make room on its disk") from error
        if isinstance(error, OSError) and error.errno in _NOT_WRITABLE:
            raise OSError(f"{path} cannot be written ({error.strerror}); choose another path") from error
        raise


def check_folder(path: Path, advice: str) -> None:
    """Check that `path` is a folder.

    Args:
        advice: what to give instead, for the message.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        NotADirectoryError: it is a file.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}; {advice}")
    if not path.is_dir():
        raise NotADirectoryError(f"{path} is a file and not a folder; {advice}")


@contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder`, which was just created, if the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on `folder` during the block.

    Raises:
        BlockingIOError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder} is in use by another process; wait for it, or stop it") from None
        yield
    finally:
        os.close(handle)


def _draft_name(name: str, suffix: str = "") -> str:
    """A hidden name, unique to this thread and no longer than a file system allows."""
    suffix = f".{os.getpid()}-{threading.get_ident()}{suffix}"
    room = _MAX_FILE_NAME - len(suffix) - 1
    return "." + os.fsencode(name)[:room].decode(errors="ignore") + suffix


def _usual_mode(probe: Path) -> int:
    """The mode of a new file in this folder; safetensors makes files that only their owner may read.

    A probe file shows it: reading the umask means changing it, for other threads too.
    """
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8: atomically into a file, and straight into a device or a pipe."""
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _is_special(path: Path) -> bool:
    """Whether `path` exists and is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file  # not earlier: it imports torch, which not every command needs

    with atomic_write(path) as draft:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(on_cpu, draft, metadata={"format": "pt"})
        except SafetensorError as error:  # safetensors' form of an OSError, without its errno
            raise OSError(f"{path} cannot be written ({error}); make room on its disk, or choose another") from error


RETRAIN = "the run is damaged: copy its folder again, or train again"
"""Advice about an unreadable file of a run."""


def read_tensors(file: Path, advice: str = RETRAIN) -> dict[str, "torch.Tensor"]:
    """Read the tensors of a safetensors file.

    Args:
        advice: what the user can do if it is unreadable, for the message.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; {advice}")
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); {advice}") from error


def load_tensors(module: "torch.nn.Module", tensors: Mapping[str, "torch.Tensor"], source: str) -> None:
    """Load `tensors` into `module` after checking them.

    Args:
        source: the file that they are from, for the message.

    Raises:
        ValueError: names or shapes differ from the module's, or values are not finite.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{source} holds {shapes}, not the tensors of its own experiment; it was swapped or damaged")
    if bad := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{source} holds NaN or infinity in {', '.join(bad)}; it is damaged, train again")
    module.load_state_dict(dict(tensors))


def read_json(path: Path, advice: str = RETRAIN) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        advice: what the user can do if it is unreadable, for the message.

    Raises:
        FileNotFoundError, ValueError: the file is missing, is not JSON, or is not an object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {advice}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; {advice}")
    return values
