"""One folder, several engines; and two copies behind Ray Serve."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save

from softprompt.serve import Engine, EngineClosed
from softprompt.serve.api.app import make_app
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.store import PromptStore
from softprompt.serve.prompts.sync import PromptSync

LABELS = ["yes", "no"]


def content(dim: int, seed: int, length: int = 4) -> bytes:
    return save({"prompt_embeddings": torch.randn(length, dim, generator=torch.Generator().manual_seed(seed))})


def test_every_engine_serves_the_shared_folder(
    engine_of: Callable[..., Engine], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines = [engine_of(prompts=1), engine_of(prompts=1)]
    store = PromptStore(tmp_path, shared=True)
    metrics = [Metrics(), Metrics()]
    for numbers, engine in zip(metrics, engines, strict=True):
        numbers.bind(engine)
    syncs = [PromptSync(engine, store, numbers) for engine, numbers in zip(engines, metrics, strict=True)]

    def poll() -> list[list[str]]:
        for sync in syncs:
            sync.poll()
        return [[entry.name for entry in engine.prompts] for engine in engines]

    def scores() -> list[Any]:
        return [engine.classify("new", ["a"], LABELS)[0].result(30.0).logprobs for engine in engines]

    dim = engines[0].backbone.dim
    with store.saving("new", content(dim, 0)):
        engines[0].add(
            "new", next(iter([engines[0].get("p0").prompt]))
        )  # the first engine serves another prompt than the folder has
    assert poll() == [["new", "p0"]] * 2
    first = scores()
    assert first[0] == first[1]
    with store.saving("new", content(dim, 1, length=7)):
        pass
    poll()
    second = scores()
    assert second[0] == second[1] != first[0]
    for name in ("broken", "no name"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"nonsense")
    assert poll() == [["new", "p0"]] * 2
    assert "'no name' cannot be a prompt name" in caplog.text
    store.delete("new")
    metrics[1].observe_request("/v1/classify", 200, "new", 0.1, 1, 0)
    assert b"new" in metrics[1].render()
    assert poll() == [["p0"]] * 2
    assert b"new" not in metrics[1].render()
    with pytest.raises(PermissionError, match="restart without it"):
        store.delete("p0")


def test_prompt_from_elsewhere_outlives_a_bad_folder_of_its_name(
    engine_of: Callable[..., Engine], tmp_path: Path
) -> None:
    engine, store = engine_of(prompts=1), PromptStore(tmp_path, shared=True)
    sync = PromptSync(engine, store, Metrics())
    (tmp_path / "p0").mkdir()
    (tmp_path / "p0/adapter_model.safetensors").write_bytes(b"nonsense")
    sync.poll()
    shutil.rmtree(tmp_path / "p0")
    sync.poll()
    assert "p0" in engine


def test_bad_folder_does_not_block_the_others(
    engine_of: Callable[..., Engine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, store = engine_of(prompts=0), PromptStore(tmp_path, shared=True)
    sync, real = PromptSync(engine, store, Metrics()), engine.add
    wrong: dict[str, Exception] = {"a": KeyError("prompt"), "b": torch.OutOfMemoryError("memory")}
    tried: list[str] = []

    def add(name: str, *arguments: Any, **options: Any) -> Any:
        tried.append(name)
        if name in wrong:
            raise wrong[name]
        return real(name, *arguments, **options)

    monkeypatch.setattr(engine, "add", add)
    for seed, name in enumerate("abc"):
        with store.saving(name, content(engine.backbone.dim, seed)):
            pass
    sync.poll()
    assert [entry.name for entry in engine.prompts] == ["c"]
    assert "the prompt a cannot be served: KeyError" in caplog.text
    del wrong["b"]
    sync.poll()  # memory may be free again, but a damaged file stays damaged
    assert [entry.name for entry in engine.prompts] == ["b", "c"]
    assert tried == ["a", "b", "c", "b"]
    store.delete("c")
    with store.saving("d", content(engine.backbone.dim, 4)):
        pass
    wrong["d"] = EngineClosed("the service is shutting down")
    with pytest.raises(EngineClosed):
        sync.poll()


def test_name_is_added_by_one_replica_only(engine_of: Callable[..., Engine], tmp_path: Path) -> None:
    auth = AuthConfig(tokens=("ask",), admin_tokens=("change",))
    files = [content(engine_of(prompts=0).backbone.dim, seed) for seed in (0, 1)]
    codes = []
    for file in files:  # none of them looks at the folder meanwhile
        app = make_app(engine_of(prompts=0), auth, store=PromptStore(tmp_path, shared=True))
        with TestClient(app, base_url="http://localhost", headers={"Authorization": "Bearer change"}) as client:
            codes.append(client.post("/v1/prompts", params={"name": "x"}, content=file).status_code)
            assert client.get("/v1/prompts/x").status_code == (200 if codes[-1] == 201 else 404)
            kept = (tmp_path / "x" / "adapter_model.safetensors").read_bytes()
            assert kept == files[0]
    assert codes == [201, 409]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra sweep (ray)")
def test_two_replicas_behind_ray(run_folders: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "softprompt.cli", "serve", f"tickets={run_folders[0]}", "--engine", "ray"]
    command += ["--replicas", "2", "--cpus", "0.5", "--port", "0", "--prompts", str(tmp_path / "shared")]
    command += ["--dtype", "float32", "--device", "cpu", "--grace", "5"]
    environment = {**os.environ, "SOFTPROMPT_TOKEN": "sesame", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines = [""]
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", lines[-1])):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        servers = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "gcs_server" in child.name()
        ]
        assert [server.environ()["RAY_AUTH_MODE"] for server in servers] == ["token"]  # its port is open to the network
        with httpx.Client(base_url=address[0], headers={"Authorization": "Bearer sesame"}, timeout=60) as client:
            assert httpx.get(f"{address[0]}/v1/models").status_code == 401
            body = {"model": "tickets", "input": ["a a a"]}
            answers = [client.post("/v1/classify", json=body).json()["results"] for _ in range(6)]
            assert all(answer == answers[0] for answer in answers)
            client.put("/v1/prompts/new", content=content(32, 0)).raise_for_status()
            time.sleep(2.5)
            ask = {"model": "new", "prompt": "a", "max_tokens": 4}
            texts = [client.post("/v1/completions", json=ask).json()["choices"][0]["text"] for _ in range(8)]
            assert len(set(texts)) == 1
            with client.stream("POST", "/v1/completions", json={**ask, "stream": True}) as stream:
                assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
            assert client.delete("/v1/prompts/tickets").status_code == 403
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert json.loads(out.splitlines()[-1])["prompts"] == ["tickets"]
    assert process.returncode == 0
