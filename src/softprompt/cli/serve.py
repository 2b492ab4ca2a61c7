"""`softprompt serve`: many prompts from one backbone."""

import importlib.util
from typing import Annotated, Any

import tyro

from softprompt.cli.terminal import console
from softprompt.serve.config import ServeConfig


def serve_(
    config: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),  # noqa: B008  (a frozen value)
) -> dict[str, Any]:
    """Serve prompts over HTTP."""
    extras, modules = ["serve"], ["fastapi", "uvicorn", "prometheus_client"]
    if config.engine == "ray":
        extras, modules = [*extras, "sweep"], [*modules, "ray"]
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"serving needs {', '.join(missing)}; install it in softprompt's clone with: "
            f"pip install '.[{','.join(extras)}]'"
        )
    from softprompt.serve.replicas import serve_replicas
    from softprompt.serve.service import serve

    config.auth()  # rejects missing tokens before anything is loaded
    source, address = config.backbone_source(), ""

    def on_start(url: str) -> None:
        nonlocal address
        address = url
        console.print(f"serving {len(config.sources)} prompts and uploaded ones at {url} (Ctrl-C ends it)")

    part = "backbone" if config.engine_url is None else "backbone's tokenizer and embedding table"
    console.print(f"loading the {part} ...")
    if config.engine == "ray":
        serve_replicas(config, on_start=on_start)
    else:
        serve(config, on_start=on_start)
    return {"command": "serve", "address": address, "backbone": source, "prompts": config.names()}
