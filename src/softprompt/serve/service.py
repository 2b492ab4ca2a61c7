"""One process: backbone, engine and HTTP, from start to graceful end."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from softprompt.backbones import Backbone
from softprompt.serve.api.app import make_app
from softprompt.serve.api.middleware import AuthConfig, this_machine
from softprompt.serve.engine.engine import Engine
from softprompt.serve.limits import Limits
from softprompt.serve.log import write_log
from softprompt.serve.metrics import Metrics
from softprompt.serve.prompts.entry import checked_name
from softprompt.serve.prompts.store import PromptStore

_BACKLOG = 2048
"""Connections that may wait to be taken, as in uvicorn."""


def named(source: str) -> tuple[str, Path]:
    """`NAME=FOLDER`, or a folder under its own name.

    Raises:
        ValueError: the name cannot be a prompt's.

    >>> named("reviews=runs/sentiment-dpt-0")
    ('reviews', PosixPath('runs/sentiment-dpt-0'))
    """
    name, equals, folder = source.partition("=")
    path = Path(folder if equals else source).expanduser()
    return checked_name(name if equals else path.resolve().name), path


def refuse_open(host: str, access: AuthConfig) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        ValueError: naming the address.
    """
    if access.open and not this_machine(host):
        raise ValueError(
            f"{host} can be reached from other machines, and there is no token; set SOFTPROMPT_TOKEN or --token-file, "
            "or listen on 127.0.0.1"
        )


def listening(host: str, port: int) -> socket.socket:
    """A socket at that address; it takes no connection yet.

    Raises:
        OSError: the port is taken, or the address is none of this machine's.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(_BACKLOG)  # from here on nobody is turned away, though the server takes them a moment later
    except (OSError, OverflowError) as error:
        found.close()
        raise OSError(f"{host} port {port} cannot be listened on ({error}); choose another --port or --host") from error
    return found


def address_of(host: str, port: int) -> str:
    """As a client writes it.

    >>> address_of("::1", 8000)
    'http://[::1]:8000'
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def started_engine(
    backbone: Backbone, sources: Sequence[tuple[str, Path]], store: PromptStore | None, limits: Limits, metrics: Metrics
) -> Engine:
    """An engine with all its prompts; one that was sent takes the place of a run of its name."""
    engine = Engine(backbone, limits, metrics.passed)
    try:
        for name, folder in sources:
            engine.add(name, folder)
        for name in store.names() if store is not None else ():
            assert store is not None
            engine.add(name, store.path(name), replace=True)
    except BaseException:
        engine.close(0.0)
        raise
    return engine


def serve(
    backbone: Backbone,
    sources: Sequence[tuple[str, Path]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    prompts: Path | None = None,
    access: AuthConfig | None = None,
    limits: Limits | None = None,
    log_texts: bool = False,
    grace: float = 30.0,
    started: Callable[[str], None] | None = None,
) -> None:
    """Answer over HTTP until the process is told to stop (SIGTERM or Ctrl-C); then finish what there is.

    Args:
        sources: name and folder of each run or PEFT prompt.
        prompts: folder that keeps prompts which are sent.
        grace: seconds for what is being answered when it is told to stop.
        started: told the address once requests are taken.

    Raises:
        ValueError: `host` is beyond this machine and `access` has no token, or a prompt does not fit.
        OSError: the port is taken.
    """
    access = access or AuthConfig()
    refuse_open(host, access)
    with closing(listening(host, port)) as place:
        store, metrics = None if prompts is None else PromptStore(prompts), Metrics()
        engine = started_engine(backbone, sources, store, limits or Limits(), metrics)
        write_log()
        app = make_app(engine, access, metrics=metrics, store=store, log_texts=log_texts, grace=grace)
        server = _server(app, grace)
        try:
            with _stopped_once(server):
                if started is not None:
                    started(address_of(host, place.getsockname()[1]))
                server.run(sockets=[place])
        finally:
            engine.close(0.0)


def _server(app: Any, grace: float) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
    )


@contextmanager
def _stopped_once(server: uvicorn.Server) -> Iterator[None]:
    """A signal stops the server also while it does not handle signals yet.

    At its end the server raises the one that stopped it once more, to whoever handled it before: then nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
