"""`softprompt serve` as a user starts and stops it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from softprompt.cli import main
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.config import ServeConfig
from softprompt.serve.service import serve


def test_two_runs_are_served_until_sigterm(run_folders: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "softprompt.cli", "serve", str(run_folders[0]), f"other={run_folders[1]}"]
    command += ["--port", "0", "--prompts", str(tmp_path / "sent"), "--dtype", "float32", "--max-wait", "1"]
    environment = {**os.environ, "SOFTPROMPT_TOKEN": "sesame", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr is not None
    try:
        lines = []
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        with httpx.Client(base_url=address[0], headers={"Authorization": "Bearer sesame"}, timeout=60) as client:
            names = [model["id"] for model in client.get("/v1/models").json()["data"]]
            assert names == ["other", "tickets-3", "base"]
            rows = {"model": "other", "input": [{"text": "a a a"}, "b b"]}
            answer = client.post("/v1/classify", json=rows).json()
            assert len(answer["results"]) == 2
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    finally:
        process.kill()
    result = json.loads(out.splitlines()[-1])
    assert result["command"] == "serve"
    assert result["prompts"] == ["tickets-3", "other"]
    logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged if line.get("route") == "/v1/classify"] == [200]
    assert process.returncode == 0, rest


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_public_address_without_token_is_rejected(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOFTPROMPT_TOKEN", raising=False)
    monkeypatch.delenv("SOFTPROMPT_ADMIN_TOKEN", raising=False)
    assert main(["serve", "--backbone", "nothing", "--host", host]) == 1
    assert "there is no token" in capsys.readouterr().err
    AuthConfig(tokens=("sesame",)).check_host(host)


def test_taken_or_impossible_port_is_named(tiny_backbone: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="choose another --port"):
        serve(ServeConfig(port=taken.getsockname()[1]), tiny_backbone("llama"))
    with pytest.raises(OSError, match="choose another --port"):
        serve(ServeConfig(port=70_000), tiny_backbone("llama"))


def test_missing_setting_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, run_folders: list[Path]) -> None:
    assert main(["serve"]) == 1
    assert "give --backbone" in capsys.readouterr().err
    (tmp_path / "tokens").write_text("\n")
    assert main(["serve", "--token-file", str(tmp_path / "tokens")]) == 1
    assert "holds no token" in capsys.readouterr().err
    assert main(["serve", str(run_folders[0]), str(tmp_path / "nowhere"), "--dtype", "float32"]) == 1
    assert "nowhere" in capsys.readouterr().err


STOPPED_AT_START = """
import os, signal, socket, sys, urllib.parse
from softprompt.serve.config import ServeConfig
from softprompt.serve.service import serve

def on_start(address):
    url = urllib.parse.urlsplit(address)
    socket.create_connection((url.hostname, url.port), 5).close()
    print("taken", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

serve(ServeConfig(sources=(f"one={sys.argv[1]}",), port=0, dtype="float32"), on_start=on_start)
print("ended", flush=True)
"""


def test_signal_at_start_ends_the_service(run_folders: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_AT_START, str(run_folders[0])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["taken", "ended"], done.stderr[-2000:]
    assert done.returncode == 0
