"""The service as one process: engine and HTTP server, from start to graceful shutdown."""

import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import final

import uvicorn

from softprompt.backbones import Backbone, load, load_embeddings
from softprompt.serve.api.app import make_app
from softprompt.serve.config import ServeConfig
from softprompt.serve.engine.base import BaseEngine
from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.threads import call_in_own_thread
from softprompt.serve.engine.vllm import VllmEngine
from softprompt.serve.log import configure_logging
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.store import PromptStore

_BACKLOG = 2048
"""Connections that may wait to be accepted, as in uvicorn."""
_SLACK = 10.0
"""Seconds after `grace` in which the engine fails the requests that are left and their answers are sent."""


def serve(
    config: ServeConfig, backbone: Backbone | None = None, *, on_start: Callable[[str], None] | None = None
) -> None:
    """Serve over HTTP until SIGTERM or Ctrl-C, then finish the running requests.

    Args:
        backbone: None: `config`'s, loaded here.
        on_start: called with the address once connections are accepted.

    Raises:
        ValueError: other machines can reach `host` and there is no token, or a prompt does not fit the backbone or the
            engine.
        EngineUnavailable: no vLLM server answers at `engine_url`.
        OSError: the port is taken.
    """
    auth = config.auth()
    if backbone is None:
        backbone = call_in_own_thread(lambda: load_backbone(config))
    with closing(listen(config.host, config.port)) as sock:
        store, metrics = None if config.prompts is None else PromptStore(config.prompts), Metrics()
        engine = start_engine(config, backbone, store=store, metrics=metrics)
        configure_logging()
        app = make_app(engine, auth, metrics=metrics, store=store, log_texts=config.log_texts, grace=0.0)
        server = _Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=math.ceil(config.grace + _SLACK),
            ),
            engine,
            config.grace,
        )
        try:
            with _stop_on_signal(server):
                if on_start is not None:
                    on_start(url(config.host, sock.getsockname()[1]))
                server.run(sockets=[sock])
        finally:
            engine.close(0.0)


@final
class _Server(uvicorn.Server):
    """Closes the engine while it waits for running requests, so that those left after `grace` seconds get its error."""

    def __init__(self, config: uvicorn.Config, engine: BaseEngine, grace: float) -> None:
        super().__init__(config)
        self._engine, self._grace = engine, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the running requests, and end."""
        threading.Thread(target=self._engine.close, args=[self._grace], daemon=True).start()
        await super().shutdown(sockets)


def load_backbone(config: ServeConfig) -> Backbone:
    """The backbone of `config`, with packed weights if it asks for them; for vLLM, its tokenizer and table alone.

    Raises:
        ValueError: as `softprompt.load_backbone`, `load_embeddings` and `Backbone.with_decode_weights` raise.
    """
    if config.engine == "vllm":
        return load_embeddings(config.backbone_source(), dtype=config.dtype)
    backbone = load(config.backbone_source(), dtype=config.dtype, device=config.device)
    return backbone.with_decode_weights(config.decode_weights)


def start_engine(
    config: ServeConfig, backbone: Backbone, *, store: PromptStore | None = None, metrics: Metrics
) -> BaseEngine:
    """An engine with the config's prompts and those of `store`, which replace others of the same name.

    Args:
        backbone: of `load_backbone`.
    """
    engine: BaseEngine
    if config.engine_url is not None:
        engine = VllmEngine(backbone, config.engine_url, key=os.environ.get("VLLM_API_KEY", ""), limits=config.limits)
    else:
        engine = Engine(backbone, config.limits, metrics.observe_batch)
    try:
        for name, folder in config.folders():
            engine.add(name, folder)
        if store is not None:
            for name in store.names():
                engine.add(name, store.path(name), replace=True)
    except BaseException:
        engine.close(0.0)
        raise
    return engine


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to that address; connections queue until the server accepts them.

    Raises:
        OSError: the port is taken, or the address is not one of this machine's.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        raise OSError(f"cannot listen on {host} port {port} ({error}); choose another --port or --host") from error
    return sock


def url(host: str, port: int) -> str:
    """The URL of a host and port.

    >>> url("::1", 8000)
    'http://[::1]:8000'
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def _stop_on_signal(server: uvicorn.Server) -> Iterator[None]:
    """Let a signal stop the server also before it installs its own handlers.

    When it ends, the server raises the signal that stopped it again, for the handlers installed here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
