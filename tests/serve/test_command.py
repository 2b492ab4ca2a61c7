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
from softprompt.serve.api.middleware import AuthConfig
from softprompt.serve.service import refuse_open, serve


def test_two_runs_are_served_until_the_process_is_told_to_stop(run_folders: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "softprompt.cli", "serve", str(run_folders[0]), f"other={run_folders[1]}"]
    command += ["--port", "0", "--prompts", str(tmp_path / "sent"), "--dtype", "float32", "--max-wait", "1"]
    environment = {**os.environ, "SOFTPROMPT_TOKEN": "sesame", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert process.stderr is not None
    try:
        lines = []
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        with httpx.Client(base_url=found[0], headers={"Authorization": "Bearer sesame"}, timeout=60) as client:
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
def test_it_does_not_listen_beyond_this_machine_without_a_token(
    host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOFTPROMPT_TOKEN", raising=False)
    monkeypatch.delenv("SOFTPROMPT_ADMIN_TOKEN", raising=False)
    assert main(["serve", "--backbone", "nothing", "--host", host]) == 1
    assert "there is no token" in capsys.readouterr().err
    refuse_open(host, AuthConfig(tokens=("sesame",)))


def test_a_port_that_is_taken_is_named(tiny_backbone: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="choose another --port"):
        serve(tiny_backbone("llama"), [], port=taken.getsockname()[1])
    with pytest.raises(OSError, match="choose another --port"):
        serve(tiny_backbone("llama"), [], port=70_000)


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, run_folders: list[Path]) -> None:
    assert main(["serve"]) == 1
    assert "give --backbone" in capsys.readouterr().err
    (tmp_path / "tokens").write_text("\n")
    assert main(["serve", "--token-file", str(tmp_path / "tokens")]) == 1
    assert "holds no token" in capsys.readouterr().err
    assert main(["serve", str(run_folders[0]), str(tmp_path / "nowhere"), "--dtype", "float32"]) == 1
    assert "nowhere" in capsys.readouterr().err


AT_ONCE = """
import os, signal, socket, sys, urllib.parse
from pathlib import Path
from softprompt import load_backbone, open_run
from softprompt.serve.service import serve

def started(address):
    url = urllib.parse.urlsplit(address)
    socket.create_connection((url.hostname, url.port), 5).close()
    print("taken", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

folder = Path(sys.argv[1])
backbone = load_backbone(open_run(folder).experiment.backbone, dtype="float32")
serve(backbone, [("one", folder)], port=0, started=started)
print("ended", flush=True)
"""


def test_its_address_is_told_once_it_is_taken_and_a_signal_at_once_ends_it(run_folders: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, str(run_folders[0])], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["taken", "ended"], done.stderr[-2000:]
    assert done.returncode == 0
