"""What Prometheus reads: the line, batches, latency by prompt, tokens, errors."""

from collections.abc import Callable
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.runner import BatchDone

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@final
class Metrics:
    """One service's numbers, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine: Engine | None = None
        named: Any = {"registry": self.registry}
        self._batch = Histogram(
            "softprompt_batch_rows", "Rows of a pass of the model.", ["kind"], buckets=_ROWS, **named
        )
        self._passes = Histogram(
            "softprompt_pass_seconds", "Seconds of a pass of the model.", ["kind"], buckets=_SECONDS, **named
        )
        self._latency = Histogram(
            "softprompt_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["prompt", "route"],
            buckets=_SECONDS,
            **named,
        )
        self._requests = Counter("softprompt_requests", "Requests by route and status.", ["route", "status"], **named)
        self._tokens = Counter("softprompt_tokens", "Tokens read and written.", ["prompt", "kind"], **named)
        self._waiting = Gauge("softprompt_waiting_rows", "Rows in line.", **named)
        self._writing = Gauge("softprompt_writing_rows", "Rows being written.", **named)
        self._prompts = Gauge("softprompt_prompts", "Prompts that are served.", **named)
        self._most = Gauge(
            "softprompt_max_batch_rows", "Rows that a pass may have; less after memory ran out.", **named
        )

    def passed(self, done: BatchDone) -> None:
        """A pass of the model is over."""
        self._batch.labels(done.kind).observe(done.rows)
        self._passes.labels(done.kind).observe(done.seconds)

    def answered(self, route: str, status: int, prompt: str, seconds: float, read: int, written: int) -> None:
        """A request is over; `prompt` is empty where it named none, and one that is gone by now gets no numbers."""
        self._requests.labels(route, str(status)).inc()
        if self._engine is not None and self._engine.serves(prompt):
            self._latency.labels(prompt, route).observe(seconds)
            self._tokens.labels(prompt, "read").inc(read)
            self._tokens.labels(prompt, "written").inc(written)

    def forget(self, prompt: str) -> None:
        """Keep no numbers of a prompt that is gone."""
        for metric in (self._latency, self._tokens):
            metric.remove_by_labels({"prompt": prompt})

    def follow(self, engine: Engine) -> None:
        """Read the gauges from `engine` whenever they are asked for, and keep numbers of the prompts that it serves."""
        self._engine = engine
        read: dict[Gauge, Callable[[], float]] = {
            self._waiting: lambda: engine.status().waiting,
            self._writing: lambda: engine.status().writing,
            self._prompts: lambda: engine.status().prompts,
            self._most: lambda: engine.status().max_batch,
        }
        for gauge, value in read.items():
            gauge.set_function(value)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
