"""Engines over tiny random models, with prompts of different lengths and methods."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from safetensors.torch import save

import softprompt
from softprompt.backbones import Backbone, load
from softprompt.prompts import METHODS, SoftPrompt
from softprompt.serve import BaseEngine, Engine, Limits
from softprompt.serve.api.app import make_app
from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.store import PromptStore

SMALL = {"rank": 2, "width": 4, "positions": 64, "samples": 20}


def _prompt_of(backbone: Backbone, seed: int, method: str = "dpt", length: int | None = None) -> SoftPrompt:
    """A random prompt; its length differs from seed to seed."""
    config = METHODS[method]()
    settings = {**SMALL, "length": length or 2 + 3 * (seed % 5)}
    config = config.replace(**{name: value for name, value in settings.items() if hasattr(config, name)})
    prompt = config.build(backbone.host(("yes", "no")), torch.Generator().manual_seed(seed))
    noise = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return prompt.eval()


@pytest.fixture(scope="session")
def prompt_of() -> Callable[..., SoftPrompt]:
    """`prompt_of(backbone, seed, method, length)`."""
    return _prompt_of


@pytest.fixture
def engine_of(tiny_backbone: Callable[[str], Backbone]) -> Iterator[Callable[..., Engine]]:
    """`engine_of("llama", prompts=2, max_batch=4)` serves `p0` and `p1`; closed when the test ends."""
    made: list[Engine] = []

    def make(name: str = "llama", prompts: int = 5, shifting: bool = True, **limits: Any) -> Engine:
        engine = Engine(tiny_backbone(name), Limits(**{"timeout": 60.0, **limits}))
        made.append(engine)
        methods = ("dpt", "plain", "dept", "adept") if shifting else ("dpt", "plain")
        for seed in range(prompts):
            engine.add(f"p{seed}", _prompt_of(engine.backbone, seed, methods[seed % len(methods)]))
        return engine

    yield make
    for engine in made:
        engine.close(grace=10.0)


@pytest.fixture
def local_engine(llama_folder: Path) -> Iterator[Engine]:
    """The engine over the weights of `llama_folder`, without prompts."""
    with Engine(load(str(llama_folder), dtype="float32")) as engine:
        yield engine


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path, ticket_task: Path) -> list[Path]:
    """Two short runs of the tickets task, with prompts of different lengths."""
    out = tmp_path_factory.mktemp("runs")
    folders = []
    for length in (3, 6):
        experiment = softprompt.Experiment(
            backbone=str(llama_folder),
            task=str(ticket_task),
            prompt=softprompt.DPT(rank=2, length=length),
            training=softprompt.TrainingConfig(steps=2, batch_size=4, eval_steps=2),
            dtype="float32",
        )
        folders.append(softprompt.train(experiment, out=out, name=f"tickets-{length}").folder)
    return folders


@dataclass
class Service:
    """A service behind a real server, and its clients."""

    address: str
    engine: Any
    store: Path
    token: str = "sesame"
    admin_token: str = "admin"

    def client(self, headers: dict[str, str] | None = None) -> httpx.Client:
        """A client with the token, unless other headers are given."""
        headers = {"Authorization": f"Bearer {self.token}"} if headers is None else headers
        return httpx.Client(base_url=self.address, headers=headers, timeout=60)

    def admin(self) -> httpx.Client:
        """A client that may change prompts."""
        return self.client({"Authorization": f"Bearer {self.admin_token}"})

    def openai(self) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=self.token, max_retries=0, timeout=60)

    def post(self, path: str, body: str) -> bytes:
        """A request as raw bytes."""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.token}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, port = self.address.removeprefix("http://").split(":")
        return host, int(port)


@pytest.fixture
def host_engine(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """`host_engine(engine, auth)`: a service on a free port, its prompts saved in `tmp_path / "store"`."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def host(engine: BaseEngine, metrics: Metrics | None = None, auth: AuthConfig | None = None) -> Service:
        auth = auth or AuthConfig(tokens=(Service.token,), admin_tokens=(Service.admin_token,), body_seconds=1.0)
        app = make_app(engine, auth, metrics=metrics, store=PromptStore(tmp_path / "store"), grace=10.0)
        config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=10)
        sock = config.bind_socket()
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        servers.append((server, thread))
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        while not server.started:
            time.sleep(0.02)
        assert httpx.get(f"{address}/readyz").status_code == 200
        return Service(address, engine, tmp_path / "store")

    yield host
    for server, thread in servers:
        server.should_exit = True
        thread.join(15)


@pytest.fixture
def service_of(engine_of: Callable[..., Engine], host_engine: Callable[..., Service]) -> Callable[..., Service]:
    """`service_of(auth, prompts=3)`: a service over `engine_of(prompts=3)`."""

    def make(auth: AuthConfig | None = None, **engine_options: Any) -> Service:
        engine, metrics = engine_of(**engine_options), Metrics()
        engine._runner._on_batch = metrics.observe_batch
        return host_engine(engine, metrics, auth)

    return make


@pytest.fixture
def service(service_of: Callable[..., Service]) -> Service:
    """Three prompts, one token to send requests and one to change prompts."""
    return service_of(prompts=3)


@pytest.fixture(scope="session")
def prompt_file() -> Callable[..., bytes]:
    """`prompt_file(engine, length=4, dtype=torch.bfloat16)`: what PEFT writes."""

    def make(engine: Engine, length: int = 4, **changes: Any) -> bytes:
        dim = changes.get("dim", engine.backbone.dim)
        matrix = torch.randn(length, dim, generator=torch.Generator().manual_seed(7)) * changes.get("scale", 1.0)
        return save({changes.get("name", "prompt_embeddings"): matrix.to(changes.get("dtype", torch.float32))})

    return make


@pytest.fixture(scope="session")
def error_of() -> Callable[[httpx.Response], dict[str, Any]]:
    """The error of a response, in OpenAI's format."""

    def read(response: httpx.Response) -> dict[str, Any]:
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    return read
