"""`--engine vllm` refuses a server, a backbone or settings that do not fit, before it serves anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm, other_weights

from softprompt.backbones import Backbone, load_embeddings
from softprompt.cli import main
from softprompt.serve import Engine, EngineUnavailable, VllmEngine
from softprompt.serve.config import ServeConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"takes_embeds": False}, "takes no prompt embeddings; start it with --enable-prompt-embeds"),
        ({"key": "secret"}, "asks for an API key; set VLLM_API_KEY"),
    ],
)
def test_server_without_embeddings_or_key_is_refused(
    settings: dict[str, Any], message: str, local_engine: Engine, llama_folder: Path
) -> None:
    with (
        FakeVllm(local_engine.backbone.model, **settings) as url,
        pytest.raises((ValueError, EngineUnavailable), match=message),
    ):
        VllmEngine(load_embeddings(str(llama_folder), dtype="float32"), url)


def test_key_is_taken_from_the_environment(local_engine: Engine, llama_folder: Path) -> None:
    backbone = load_embeddings(str(llama_folder), dtype="float32")
    with FakeVllm(local_engine.backbone.model, key="secret") as url, VllmEngine(backbone, url, key="secret") as engine:
        assert engine.generate("base", "a", max_new_tokens=2).result(60.0)


def test_other_model_is_refused(tiny_backbone: Any, llama_folder: Path) -> None:
    backbone = load_embeddings(str(llama_folder), dtype="float32")
    with FakeVllm(tiny_backbone("opt").model) as url, pytest.raises(ValueError, match="vectors of 32 values"):
        VllmEngine(backbone, url)
    other = other_weights(tiny_backbone("llama").model)
    with FakeVllm(other) as url, pytest.raises(ValueError, match="unlike the text itself"):
        VllmEngine(backbone, url)


def test_what_is_no_vllm_server_is_refused(llama_folder: Path, host_engine: Any, local_engine: Engine) -> None:
    backbone = load_embeddings(str(llama_folder), dtype="float32")
    with pytest.raises(EngineUnavailable, match=r"no vLLM server answers at http://127\.0\.0\.1:9 "):
        VllmEngine(backbone, "http://127.0.0.1:9")
    service = host_engine(local_engine)  # it asks for a token of its own
    with pytest.raises(EngineUnavailable, match="asks for an API key"):
        VllmEngine(backbone, service.address)
    with pytest.raises(EngineUnavailable, match="does not list its model as vLLM does"):
        VllmEngine(backbone, service.address, key=service.token)


def test_backbone_that_scales_its_embeddings_is_refused(tiny_backbone: Callable[[str], Backbone]) -> None:
    with pytest.raises(ValueError, match="scales inside its embedding"):
        VllmEngine(tiny_backbone("gemma"), "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "vllm"], "engine_url is None; with engine vllm it must be the URL"),
        (["--engine", "vllm", "--engine-url", "localhost:8000"], "engine_url is 'localhost:8000'"),
        (["--engine-url", "http://127.0.0.1:9"], "leave it out, or use engine vllm"),
        (["--engine", "vllm", "--engine-url", "http://127.0.0.1:9", "--max-wait", "7"], "no effect where vLLM runs"),
        (["--engine", "vllm", "--engine-url", "http://127.0.0.1:9", "--device", "cpu"], "no effect where vLLM runs"),
        (["--engine", "vllm", "--engine-url", "http://127.0.0.1:9", "--dtype", "nf4"], "a table is not quantized"),
        (["--engine", "vllm", "--engine-url", "http://127.0.0.1:9"], "no vLLM server answers"),
    ],
)
def test_command_refuses_in_one_sentence(
    flags: list[str], message: str, llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--backbone", str(llama_folder), "--port", "0", *flags]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("softprompt: ")
    assert message in line


def test_url_of_the_server_may_have_a_path() -> None:
    config = ServeConfig(backbone="x", engine="vllm", engine_url="https://host:8000/prefix")
    assert config.engine_url == "https://host:8000/prefix"
