"""The service as replicas behind Ray Serve, on one machine or a cluster; they share a folder of prompts."""

import os
import random
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from softprompt.serve.api.auth import AuthConfig
from softprompt.serve.config import ServeConfig
from softprompt.serve.service import listen, url

_PROXY_PORTS = range(20_000, 30_000)
"""Between the ports of Ray's workers (from 10,002 on) and those that Linux gives to outgoing connections (32,768)."""

_NAME = "softprompt"


def serve_replicas(config: ServeConfig, *, on_start: Callable[[str], None] | None = None) -> None:
    """Serve over HTTP from several replicas until SIGTERM or Ctrl-C.

    An uploaded prompt is saved in the shared folder, from which the other replicas serve it a second later. Without
    that folder, prompts cannot be changed.

    Args:
        on_start: called with the address once connections are accepted.

    Raises:
        ValueError: other machines can reach `host` and there is no token.
        RuntimeError: the replicas do not start; see Ray's log.
    """
    auth = config.auth()
    if config.prompts is None:
        auth = replace(auth, allow_changes=False)
    ray_config = config.ray
    if ray_config.ray_address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        # Ray's own ports are open to the network, and anyone who reaches one may run code. Ray reads this when it is
        # imported, and supports tokens from 2.52 on.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve

    config = replace(
        config,
        sources=tuple(f"{name}={folder.resolve()}" for name, folder in config.folders()),
        backbone=config.backbone_source(),
        port=config.port or _free_port(config.host),
        prompts=None if config.prompts is None else config.prompts.expanduser().resolve(),
    )

    def build() -> Any:  # called in each replica's process
        return _build_app(config, auth)

    # A cluster that runs already rejects settings of the dashboard.
    local = {} if ray_config.ray_address else {"include_dashboard": False}
    ray.init(address=ray_config.ray_address or "local", log_to_driver=False, logging_level="error", **local)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        deployment = serve.deployment(serve.ingress(build)(_replica_class())).options(
            name=_NAME,
            num_replicas=ray_config.replicas,
            ray_actor_options={"num_cpus": ray_config.cpus, "num_gpus": ray_config.gpus},
            max_ongoing_requests=4 * config.limits.max_queued,  # so that the engine's queue is full before Ray's
            graceful_shutdown_timeout_s=config.grace,
            max_constructor_retry_count=2,
        )
        serve.run(deployment.bind(), name=_NAME, route_prefix="/")
        if on_start is not None:
            on_start(url(config.host, config.port))
        _wait_for_signal()
    finally:
        serve.shutdown()
        ray.shutdown()


def _build_app(config: ServeConfig, auth: AuthConfig) -> Any:
    """The application of one replica, with its own backbone and engine."""
    from softprompt.serve.api.app import make_app
    from softprompt.serve.engine.threads import call_in_own_thread
    from softprompt.serve.log import configure_logging
    from softprompt.serve.metrics import Metrics
    from softprompt.serve.prompts.store import PromptStore
    from softprompt.serve.prompts.sync import PromptSync
    from softprompt.serve.service import load_backbone, start_engine

    configure_logging()
    store, metrics = None if config.prompts is None else PromptStore(config.prompts, shared=True), Metrics()
    engine = start_engine(config, call_in_own_thread(lambda: load_backbone(config)), metrics=metrics)
    if store is not None:
        PromptSync(engine, store, metrics).start()
    return make_app(engine, auth, metrics=metrics, store=store, log_texts=config.log_texts, grace=config.grace)


def _replica_class() -> type[Any]:
    """The class of Ray's actors; made in a function, so that Ray sends it to the replicas by value."""

    class Replica:
        def check_health(self) -> None:
            if not self.app.state.engine.alive:  # type: ignore[attr-defined]  # set by Ray
                raise RuntimeError("the engine's thread ended or is stuck; see the replica's log")

    return Replica


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.2):  # a wait without timeout would not be interrupted by a signal
        pass


def _free_port(host: str) -> int:
    """A port that is free now, and that neither Ray's workers nor outgoing connections take before the proxy does."""
    for port in random.sample(_PROXY_PORTS, 20):
        with suppress(OSError), closing(listen(host, port)):
            return port
    with closing(listen(host, 0)) as sock:
        return int(sock.getsockname()[1])
