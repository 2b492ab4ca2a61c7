"""Callbacks that follow a training run, and Ctrl-C as a request to stop it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

from softprompt.tasks import Score


@final
@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a training run after one step."""

    step: int
    """Steps done."""
    steps: int
    """Steps in total."""
    loss: float
    """Training loss of this step's batch."""
    lr: float
    """The learning rate of this step."""
    rows_per_second: float
    """Rows per second of this step, over all processes and without evaluation."""
    dev: Score | None = None
    """The development score, if this step ended with an evaluation."""

    @property
    def metrics(self) -> dict[str, float]:
        """Loss, learning rate and, after an evaluation, the development score."""
        scores = {} if self.dev is None else {"dev": self.dev.value}
        return {"loss": self.loss, "lr": self.lr, **scores}


@runtime_checkable
class TrainingCallback(Protocol):
    """Receives the progress of training runs."""

    def on_stage(self, text: str) -> None:
        """Called when a stage begins: reading rows, loading, tokenizing, training, testing."""

    def on_note(self, text: str) -> None:
        """Called with a message for the user."""

    def on_step(self, progress: Progress) -> None:
        """Called after each training step."""


@final
class NullCallback:
    """A `TrainingCallback` that does nothing."""

    def on_stage(self, text: str) -> None:
        """Do nothing."""

    def on_note(self, text: str) -> None:
        """Do nothing."""

    def on_step(self, progress: Progress) -> None:
        """Do nothing."""


@final
class NamedCallback:
    """Reports one of several concurrent runs to `callback`: its notes and development scores, with its name."""

    def __init__(self, name: str, callback: TrainingCallback) -> None:
        self._name, self._callback = name, callback

    def on_stage(self, text: str) -> None:
        """Do nothing: the concurrent runs are in different stages."""

    def on_note(self, text: str) -> None:
        """Pass the note on with the run's name."""
        self._callback.on_note(f"{self._name}: {text}")

    def on_step(self, progress: Progress) -> None:
        """Report an evaluation as a note."""
        if progress.dev is not None:
            score = f"dev {progress.dev.metric} {progress.dev.value:.3f}"
            self.on_note(f"step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {score}")


class Interrupted(Exception):
    """Training was stopped on request; the message says how to continue."""


_stop_requests: list[threading.Event] = []
"""One entry for each open `interruptible` block of the main thread; all are the same event."""
_previous_handlers: dict[int, Any] = {}
"""The signal handlers from before the outermost `interruptible` block."""


@contextmanager
def interruptible(*, twice: bool = True) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C (or SIGTERM) sets; nested blocks and concurrent runs share it.

    Args:
        twice: whether a second Ctrl-C stops at once. False if a launcher forwards the signal too.
    """
    requested = _stop_requests[0] if _stop_requests else threading.Event()
    if threading.current_thread() is not threading.main_thread():  # a concurrent run; the main thread gets the signal
        yield requested
        return

    def request(number: int, frame: Any) -> None:
        if twice and requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    if not _stop_requests:
        _previous_handlers.update(
            (number, signal.signal(number, request)) for number in (signal.SIGINT, signal.SIGTERM)
        )
    _stop_requests.append(requested)
    try:
        yield requested
    finally:
        _stop_requests.pop()
        if not _stop_requests:
            for number, handler in _previous_handlers.items():
                signal.signal(number, handler)
