"""Prometheus metrics: queue, batches, latency and tokens by prompt, requests by status."""

from collections.abc import Callable
from functools import partial
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from softprompt.serve.engine.base import BaseEngine, EngineStatus
from softprompt.serve.engine.runner import BatchStats
from softprompt.serve.prompts.entry import BASE

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@final
class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine: BaseEngine | None = None
        common: Any = {"registry": self.registry}
        self._batch_rows = Histogram(
            "softprompt_batch_rows", "Rows per forward pass.", ["kind"], buckets=_ROWS, **common
        )
        self._pass_seconds = Histogram(
            "softprompt_pass_seconds", "Seconds per forward pass.", ["kind"], buckets=_SECONDS, **common
        )
        self._request_seconds = Histogram(
            "softprompt_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["prompt", "route"],
            buckets=_SECONDS,
            **common,
        )
        self._requests = Counter("softprompt_requests", "Requests by route and status.", ["route", "status"], **common)
        self._tokens = Counter("softprompt_tokens", "Tokens of inputs and answers.", ["prompt", "kind"], **common)
        self._gauges: dict[Gauge, Callable[[EngineStatus], int]] = {
            Gauge("softprompt_queued_rows", "Rows in the queue.", **common): lambda status: status.queued,
            Gauge("softprompt_generating_rows", "Running generations.", **common): lambda status: status.generating,
            Gauge("softprompt_prompts", "Prompts that are served.", **common): lambda status: status.prompts,
            Gauge(
                "softprompt_max_batch_rows", "Largest batch; lower for a while after memory ran out.", **common
            ): lambda status: status.max_batch,
        }

    def bind(self, engine: BaseEngine) -> None:
        """Read the gauges from `engine` when they are scraped, and count tokens of its prompts and of `base` only."""
        self._engine = engine
        for gauge, value in self._gauges.items():
            gauge.set_function(partial(_read, value, engine))

    def observe_batch(self, stats: BatchStats) -> None:
        """Record a forward pass."""
        self._batch_rows.labels(stats.kind).observe(stats.rows)
        self._pass_seconds.labels(stats.kind).observe(stats.seconds)

    def observe_request(
        self, route: str, status: int, prompt: str, seconds: float, input_tokens: int, output_tokens: int
    ) -> None:
        """Record a finished request; nothing by prompt if it named none, or one that was removed meanwhile."""
        self._requests.labels(route, str(status)).inc()
        if self._engine is not None and (prompt == BASE or prompt in self._engine):
            self._request_seconds.labels(prompt, route).observe(seconds)
            self._tokens.labels(prompt, "input").inc(input_tokens)
            self._tokens.labels(prompt, "output").inc(output_tokens)

    def remove_prompt(self, prompt: str) -> None:
        """Remove the metrics of a prompt."""
        for metric in (self._request_seconds, self._tokens):
            metric.remove_by_labels({"prompt": prompt})

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _read(value: Callable[[EngineStatus], int], engine: BaseEngine) -> int:
    return value(engine.status())
