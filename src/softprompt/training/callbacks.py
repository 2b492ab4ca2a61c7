"""Who is told how a training goes, and how a person stops it."""

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
    """Where a training is, after a step."""

    step: int
    steps: int
    loss: float
    lr: float
    rows_per_second: float
    dev: Score | None = None
    """Of the evaluation at this very step; none at a step without one."""


@runtime_checkable
class TrainingCallback(Protocol):
    """Who is told how it goes."""

    def stage(self, text: str) -> None:
        """A new part of the work begins."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def step(self, progress: Progress) -> None:
        """A step is done."""


@final
class NullCallback:
    """Nobody."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def step(self, progress: Progress) -> None:
        """Nothing."""


@final
class NamedCallback:
    """One of several trainings at a time: its notes and development scores are told with its name."""

    def __init__(self, name: str, watch: TrainingCallback) -> None:
        self._name, self._watch = name, watch

    def stage(self, text: str) -> None:
        """Nothing: the others are in other parts of their work."""

    def note(self, text: str) -> None:
        """Tell it."""
        self._watch.note(f"{self._name}: {text}")

    def step(self, progress: Progress) -> None:
        """Tell an evaluation."""
        if progress.dev is not None:
            score = f"dev {progress.dev.metric} {progress.dev.value:.3f}"
            self._watch.note(f"{self._name}: step {progress.step}/{progress.steps}  loss {progress.loss:.3f}  {score}")


class Interrupted(Exception):
    """Training was asked to stop; its message says how to go on."""


_listening: list[threading.Event] = []
"""The event of each that listens in the main thread, which is one and the same."""
_before: dict[int, Any] = {}
"""The handlers of signals before the first of them."""


@contextmanager
def interruptible(*, twice: bool = True) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; of several trainings at a time all have the same.

    Args:
        twice: a second one stops at once. Not where a launcher, too, passes the terminal's signal on.
    """
    if threading.current_thread() is not threading.main_thread():
        # A training beside others, in a thread of its own, stops when the main thread's Ctrl-C asks all to.
        yield _listening[0] if _listening else threading.Event()
        return
    asked = _listening[0] if _listening else threading.Event()

    def ask(number: int, frame: Any) -> None:
        if twice and asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if not _listening:
        _before.update((number, signal.signal(number, ask)) for number in (signal.SIGINT, signal.SIGTERM))
    _listening.append(asked)
    try:
        yield asked
    finally:
        _listening.pop()
        if not _listening:
            for number, handler in _before.items():
                signal.signal(number, handler)
