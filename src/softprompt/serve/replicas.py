"""Several copies of the service behind Ray Serve, on one machine or a cluster; their prompts lie in a shared folder."""

import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from softprompt.serve.api.middleware import AuthConfig
from softprompt.serve.limits import Limits, Replicas
from softprompt.serve.service import address_of, listening, refuse_open
from softprompt.types import Dtype

_NAME = "softprompt"


def serve_replicas(
    source: str,
    sources: Sequence[tuple[str, Path]],
    how: Replicas,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    prompts: Path | None = None,
    access: AuthConfig | None = None,
    limits: Limits | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    log_texts: bool = False,
    grace: float = 30.0,
    started: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Answer over HTTP from several copies until the process is told to stop.

    A prompt that is sent to one copy lies in the shared folder, and the others serve it a second later.

    Args:
        source: the backbone, as `load_backbone` takes it; each copy loads it.
        prompts: the shared folder; where there is none, prompts cannot be changed while it runs.
        stop: set by whoever wants it to end; none: SIGTERM or Ctrl-C.

    Raises:
        ValueError: `host` is beyond this machine and `access` has no token.
        RuntimeError: the copies do not start; Ray's log says why.
    """
    if how.ray_address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Ray's own ports are open to the network, and whoever reaches one may run code. Before 2.52 it knows no token,
        # and it reads this when it is imported.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve

    access = access or AuthConfig()
    refuse_open(host, access)
    if prompts is None:
        access = replace(access, changes=False)
    folders = [(name, str(folder.resolve())) for name, folder in sources]
    store = None if prompts is None else str(prompts.expanduser().resolve())

    def build() -> Any:  # in each copy's own process
        return _app(source, folders, store, access, limits or Limits(), dtype, device, log_texts, grace)

    port = port or _free_port(host)
    local = {} if how.ray_address else {"include_dashboard": False}  # a running cluster refuses to be told
    ray.init(address=how.ray_address or "local", log_to_driver=False, logging_level="error", **local)
    try:
        serve.start(http_options={"host": host, "port": port})
        deployment = serve.deployment(serve.ingress(build)(_copy())).options(
            name=_NAME,
            num_replicas=how.replicas,
            ray_actor_options={"num_cpus": how.cpus, "num_gpus": how.gpus},
            max_ongoing_requests=4 * (limits or Limits()).max_waiting,  # the engine's own line refuses before Ray's
            graceful_shutdown_timeout_s=grace,
            max_constructor_retry_count=2,
        )
        serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        if started is not None:
            started(address_of(host, port))
        _told(stop)
    finally:
        serve.shutdown()
        ray.shutdown()


def _app(
    source: str,
    folders: Sequence[tuple[str, str]],
    prompts: str | None,
    access: AuthConfig,
    limits: Limits,
    dtype: Dtype,
    device: str,
    log_texts: bool,
    grace: float,
) -> Any:
    """One copy: its own backbone and engine, following the shared folder."""
    from softprompt.backbones import load
    from softprompt.serve.api.app import make_app
    from softprompt.serve.log import write_log
    from softprompt.serve.metrics import Metrics
    from softprompt.serve.prompts.store import PromptStore
    from softprompt.serve.prompts.sync import PromptSync
    from softprompt.serve.service import started_engine

    write_log()
    store, metrics = None if prompts is None else PromptStore(Path(prompts), shared=True), Metrics()
    pairs = [(name, Path(folder)) for name, folder in folders]
    engine = started_engine(load(source, dtype=dtype, device=device), pairs, None, limits, metrics)
    if store is not None:
        PromptSync(engine, store, metrics).start()
    return make_app(engine, access, metrics=metrics, store=store, log_texts=log_texts, grace=grace)


def _copy() -> type[Any]:
    """What Ray asks a copy beside requests; made here, so that Ray sends it to the copies by value."""

    class Copy:
        def check_health(self) -> None:
            if not self.app.state.engine.alive:  # type: ignore[attr-defined]  # Ray adds the application
                raise RuntimeError("the engine's thread ended or is stuck; its log says why")

    return Copy


def _told(stop: threading.Event | None) -> None:
    """Wait until somebody wants it to end."""
    if stop is None:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.2):
        pass


def _free_port(host: str) -> int:
    with closing(listening(host, 0)) as found:
        return int(found.getsockname()[1])
