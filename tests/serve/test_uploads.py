"""Uploaded prompts: added, replaced, deleted and kept; a hostile file or name changes nothing."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from softprompt import files
from softprompt.prompts import SoftPrompt
from softprompt.serve import Engine
from softprompt.serve.config import ServeConfig
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.store import PromptStore
from softprompt.serve.service import start_engine


def test_prompts_are_added_replaced_and_deleted(service: Any, prompt_file: Callable[..., bytes]) -> None:
    content = prompt_file(service.engine)
    with service.admin() as client:
        assert client.post("/v1/prompts", params={"name": "new"}, content=content).status_code == 201
        assert (service.store / "new" / "adapter_model.safetensors").read_bytes() == content
        assert client.post("/v1/prompts", params={"name": "new"}, content=content).status_code == 409
        body = {"model": "new", "input": "a", "labels": ["yes", "no"]}
        before = client.post("/v1/classify", json=body).json()["results"]
        other = prompt_file(service.engine, length=9, dtype=torch.bfloat16, scale=3.0)
        assert client.put("/v1/prompts/new", content=other).json()["length"] == 9
        assert client.post("/v1/classify", json=body).json()["results"] != before
        assert "new" in [prompt["name"] for prompt in client.get("/v1/prompts").json()["data"]]
        assert client.delete("/v1/prompts/new").json() == {"name": "new", "deleted": True}
        assert client.get("/v1/models/new").status_code == 404
        assert client.delete("/v1/prompts/new").status_code == 404
        assert not (service.store / "new").exists()


def damaged(engine: Engine, prompt_file: Callable[..., bytes]) -> dict[str, bytes]:
    good = prompt_file(engine)
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])

    def with_header(**changes: Any) -> bytes:
        return headed({"prompt_embeddings": {**header["prompt_embeddings"], **changes}})

    def headed(facts: dict[str, Any], coding: str = "ascii") -> bytes:
        text = json.dumps(facts).encode(coding)
        return len(text).to_bytes(8, "little") + text + good[8 + size :]

    return {
        "empty": b"",
        "cut off": good[:-5],
        "too long": good + b"x",
        "cut in the header": good[:20],
        "no safetensors": b"PK\x03\x04" + b"x" * 200,
        "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR." + b"x" * 50,
        "header longer than the file": (10**9).to_bytes(8, "little") + good[8:],
        "header no JSON": (50).to_bytes(8, "little") + b"\xff" * 500,
        "header a list": (2).to_bytes(8, "little") + b"[]",
        "deep header": (90_000).to_bytes(8, "little") + b"[" * 90_000,
        "another tensor": prompt_file(engine, name="weight"),
        "another width": prompt_file(engine, dim=7),
        "no rows": prompt_file(engine, length=0),
        "no numbers": prompt_file(engine, scale=float("nan")),
        "float64": prompt_file(engine, dtype=torch.float64),
        "huge shape": with_header(shape=[2**40, engine.backbone.dim]),
        "negative shape": with_header(shape=[-1, engine.backbone.dim]),
        "boolean shape": with_header(shape=[True, engine.backbone.dim]),
        "offsets beyond": with_header(data_offsets=[0, 10**12]),
        "dtype no text": with_header(dtype=[1]),
        "UTF-16": headed(header, "utf-16"),
        "numbers about it": headed({**header, "__metadata__": {"format": 1}}),
        "two tensors": save({"prompt_embeddings": torch.zeros(2, engine.backbone.dim), "more": torch.zeros(2)}),
    }


def test_bad_file_changes_nothing(
    service: Any, prompt_file: Callable[..., bytes], error_of: Callable[..., Any]
) -> None:
    with service.admin() as client:
        client.put("/v1/prompts/p", content=prompt_file(service.engine)).raise_for_status()
        before = client.get("/v1/prompts").json()
        for what, content in damaged(service.engine, prompt_file).items():
            for response in (
                client.put("/v1/prompts/p", content=content),
                client.post("/v1/prompts", params={"name": "fresh"}, content=content),
            ):
                assert response.status_code == 400, (what, response.text)
                error_of(response)
        assert client.get("/v1/prompts").json() == before
        assert [path.name for path in service.store.rglob("*") if path.is_file()] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "name", ["../up", "..", "%2e%2e", "a%2Fb", "..%2Fup", ".hidden", "a b", "x" * 200, "a%00b", "é"]
)
def test_names_stay_in_the_store(service: Any, name: str, tmp_path: Path, prompt_file: Callable[..., bytes]) -> None:
    before = sorted(tmp_path.rglob("*"))
    with service.admin() as client:
        content = prompt_file(service.engine)
        for response in (
            client.request("PUT", f"/v1/prompts/{name}", content=content),
            client.post(f"/v1/prompts?name={name}", content=content),
            client.delete(f"/v1/prompts/{name}"),
        ):
            assert 400 <= response.status_code < 500, response.text
    assert sorted(tmp_path.rglob("*")) == before


def test_uploads_are_served_after_a_restart(
    service: Any,
    tiny_backbone: Callable[..., Any],
    prompt_of: Callable[..., SoftPrompt],
    prompt_file: Callable[..., bytes],
) -> None:

    with service.admin() as client:
        client.put("/v1/prompts/kept", content=prompt_file(service.engine)).raise_for_status()
    expected = service.engine.classify("kept", ["a"], ["x", "y"])[0].result(30.0).logprobs
    backbone, store = tiny_backbone("llama"), PromptStore(service.store)
    with start_engine(ServeConfig(), backbone, store=store, metrics=Metrics()) as restarted:
        assert restarted.classify("kept", ["a"], ["x", "y"])[0].result(30.0).logprobs == pytest.approx(
            expected, abs=1e-6
        )


def test_drafts_of_a_killed_process_are_ignored(service: Any, prompt_file: Callable[..., bytes]) -> None:
    with service.admin() as client:
        client.put("/v1/prompts/kept", content=prompt_file(service.engine)).raise_for_status()
        (service.store / "kept" / ".adapter_model.safetensors.123-456").write_bytes(b"half")
        client.put("/v1/prompts/kept", content=prompt_file(service.engine, length=6)).raise_for_status()
        client.delete("/v1/prompts/kept").raise_for_status()
        (service.store / "run").mkdir()
        (service.store / "run" / "softprompt.json").write_text("{}")
        assert client.put("/v1/prompts/run", content=prompt_file(service.engine)).status_code == 403
    assert [path.name for path in service.store.iterdir()] == ["run"]


def test_failed_save_keeps_the_file_of_another_replica(tmp_path: Path) -> None:
    store = PromptStore(tmp_path, shared=True)
    file = tmp_path / "x" / "adapter_model.safetensors"

    def fail(meanwhile: bytes | None) -> None:
        with store.saving("x", b"ours"):
            if meanwhile is not None:
                file.write_bytes(meanwhile)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail(None)
    assert not file.parent.exists()
    with pytest.raises(RuntimeError, match="broken"):
        fail(b"theirs")
    assert file.read_bytes() == b"theirs"
    assert list(file.parent.iterdir()) == [file]


def test_prompt_that_cannot_be_saved_is_not_served(
    service: Any, prompt_file: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "no room")

    before, content = service.engine.prompts, prompt_file(service.engine)
    monkeypatch.setattr(files, "_sync", disk_full)
    # A client for each request: the server closes the connection after an error.
    with service.admin() as client:
        assert client.put("/v1/prompts/p0", content=content).status_code == 500
    with service.admin() as client:
        assert client.post("/v1/prompts", params={"name": "fresh"}, content=content).status_code == 500
    assert all(entry is old for entry, old in zip(service.engine.prompts, before, strict=True))
    assert list(service.store.iterdir()) == []
    monkeypatch.undo()
    with service.admin() as client:
        assert client.post("/v1/prompts", params={"name": "fresh"}, content=content).status_code == 201
