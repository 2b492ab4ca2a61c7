"""`softprompt serve`: many prompts from one backbone."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from softprompt import backbones as backbones
from softprompt.cli.terminal import console
from softprompt.runs import RECORD, open_run
from softprompt.serve.limits import Limits, Replicas
from softprompt.types import Dtype

Sources = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]FOLDER")]


def serve_(
    sources: Sources = (),
    backbone: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    prompts: Path | None = None,
    token_file: Path | None = None,
    admin_token_file: Path | None = None,
    engine: Literal["local", "ray"] = "local",
    replicas: Replicas = Replicas(),  # noqa: B008  (a frozen value)
    limits: Limits = Limits(),  # noqa: B008
    dtype: Dtype = "auto",
    device: str = "auto",
    grace: float = 30.0,
    log_texts: bool = False,
) -> dict[str, Any]:
    """Serve prompts over HTTP.

    Args:
        sources: Folders of runs or of PEFT prompts, each under its folder's name or the one before `=`.
        backbone: Hub id, folder, .gguf file or asset; none: the first run's.
        host: Address to listen on; one beyond this machine needs a token.
        port: Port to listen on; 0: a free one.
        prompts: Folder that keeps the prompts which are sent, and whose prompts are served too.
        token_file: File with the tokens that may ask, one a line; none: those in SOFTPROMPT_TOKEN, if it is set.
        admin_token_file: File with the tokens that may change prompts; none: SOFTPROMPT_ADMIN_TOKEN, else who may ask.
        engine: One engine in this process, or copies of it behind Ray Serve, which share the prompts' folder.
        replicas: With the engine `ray`.
        limits: What an engine takes on.
        dtype: What the backbone computes in.
        device: `auto` takes the first GPU, else the CPU.
        grace: Seconds for what is being answered when the service is told to stop.
        log_texts: Write what users send into the log.
    """
    needed = ("fastapi", "uvicorn", "prometheus_client", *(("ray",) if engine == "ray" else ()))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        extras = "serve,sweep" if engine == "ray" else "serve"
        raise ImportError(f"serving needs {', '.join(missing)}; pip install 'softprompt[{extras}]'")
    from softprompt.serve.api.middleware import AuthConfig
    from softprompt.serve.replicas import serve_replicas
    from softprompt.serve.service import named, refuse_open, serve

    access = AuthConfig(
        tokens=_tokens(token_file, "SOFTPROMPT_TOKEN"),
        admin_tokens=_tokens(admin_token_file, "SOFTPROMPT_ADMIN_TOKEN"),
    )
    refuse_open(host, access)
    pairs = [named(source) for source in sources]
    source, address = backbone or _backbone(pairs), ""
    console.print("loading the backbone ...")

    def started(where: str) -> None:
        nonlocal address
        address = where
        console.print(f"serving {len(pairs)} prompts and what is sent at {where} (Ctrl-C ends it)")

    shared: dict[str, Any] = {
        "host": host,
        "port": port,
        "prompts": prompts,
        "access": access,
        "limits": limits,
        "log_texts": log_texts,
        "grace": grace,
        "started": started,
    }
    if engine == "ray":
        serve_replicas(source, pairs, replicas, dtype=dtype, device=device, **shared)
    else:
        serve(backbones.load(source, dtype=dtype, device=device), pairs, **shared)
    return {"command": "serve", "address": address, "backbone": source, "prompts": [name for name, _ in pairs]}


def _backbone(pairs: list[tuple[str, Path]]) -> str:
    for _, folder in pairs:
        if (folder / RECORD).is_file():
            return open_run(folder).experiment.backbone
    raise ValueError("no folder names its backbone; give --backbone, or the folder of a run")


def _tokens(file: Path | None, variable: str) -> tuple[str, ...]:
    text = os.environ.get(variable, "") if file is None else file.expanduser().read_text(encoding="utf-8")
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not found:
        raise ValueError(f"{file} holds no token; write one a line")
    return found
