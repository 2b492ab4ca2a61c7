"""The engine's one thread: what it is told to do, batches of choices and steps of texts take turns in it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from typing import Any, final

import torch

from softprompt.serve.engine.queue import RequestQueue
from softprompt.serve.engine.request import ClassifyParams, EngineClosed, EngineRequest, GenerateParams
from softprompt.serve.engine.runner import Worker
from softprompt.serve.limits import Limits

_log = logging.getLogger("softprompt.serve")
_ENTER = 8
"""Rows that enter a batch in writing at one step, so that those in it are not kept waiting."""
_STUCK = 60.0
"""Seconds that a turn may last at least before the thread counts as stuck."""
_LAST = 5.0
"""Seconds for the turn in hand to end once all is given up; a thread that is stuck is left behind."""

_SHUT = "the service shut down before the answer was there"


@final
class Scheduler:
    """The thread that owns the model; any other hands it rows, and jobs to be done between two passes.

    However it ends, every row and job that it was given is settled.

    Args:
        worker: runs the batches, in this thread alone.
    """

    def __init__(self, worker: Worker, limits: Limits) -> None:
        self._worker, self._limits = worker, limits
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._doing: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._waiting = RequestQueue(limits.max_waiting)
        self._taken: list[EngineRequest] = []
        self._since: float | None = None
        self._wake = threading.Condition()
        self._closed, self._give_up = False, False
        self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and no turn has lasted longer than an answer may."""
        since = self._since
        return self._thread.is_alive() and (since is None or time.monotonic() - since < self._most)

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more, for good."""
        return self._closed

    def by_prompt(self) -> dict[str, int]:
        """Rows in line, by prompt."""
        with self._wake:
            return self._waiting.by_prompt()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Let all of them wait for their turn, or none.

        Raises:
            Full, Closed: not now.
        """
        with self._wake:
            self._refuse_closed()
            self._waiting.drop(lambda request: request.over)
            self._waiting.put(requests, self._worker.seconds_each)
            self._wake.notify()

    def do(self, job: Callable[[], Any]) -> Any:
        """What the job gives, done between two passes; raises what it raises, `EngineClosed`, or TimeoutError."""
        done: Future[Any] = Future()
        with self._wake:
            self._refuse_closed()
            self._jobs.append((job, done))
            self._wake.notify()
        if not wait([done], self._most).done:
            done.cancel()
            raise TimeoutError(
                f"the engine was busy for {self._most:g} seconds, and nothing has changed; try again later"
            )
        return done.result()

    def close(self, grace: float) -> None:
        """Take nothing more and finish what there is; what is left after `grace` seconds fails with `EngineClosed`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(grace)
        with self._wake:
            self._give_up = True
            self._wake.notify()
        self._thread.join(_LAST)
        if self._thread.is_alive():
            _log.error("the engine's thread is stuck and left behind")
            self._fail_all(EngineClosed(_SHUT))

    @property
    def _most(self) -> float:
        """Seconds that a turn may last."""
        return max(self._limits.timeout, _STUCK)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EngineClosed("the service is shutting down; ask another one")

    def _run(self) -> None:
        reason = _SHUT
        try:
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException:
            reason = "the service failed and takes nothing more; its log says why, start it anew"
            _log.exception("the engine's thread ended")
        finally:
            self._fail_all(EngineClosed(reason))

    def _turn(self) -> bool:
        """One round: jobs, a batch of choices, a token of every text; whether there may be another."""
        with self._wake:
            self._since = None
            while not self._due():
                if self._closed and not self._busy():
                    return False
                self._wake.wait(self._pause())
            if self._give_up:
                return False
            self._since = now = time.monotonic()
            self._doing = [self._jobs.popleft() for _ in range(len(self._jobs))]
            for request in (*self._waiting.everyone(), *(one for w in self._worker.writers for one in w.requests)):
                request.expire(now)
            self._waiting.drop(lambda request: request.over)
            choices = (
                self._waiting.take(ClassifyParams, self._worker.most_choices, alike=True) if self._choice_due() else []
            )
            texts = self._waiting.take(GenerateParams, min(_ENTER, self._worker.most - self._worker.active))
            self._taken = [*choices, *texts]
        for job, done in self._doing:
            if done.done():  # whoever asked has given up
                continue
            try:
                found = job()
            except BaseException as error:
                _settle(done.set_exception, error)
            else:
                _settle(done.set_result, found)
        self._doing = []
        self._worker.drop()
        for run, requests in ((self._worker.choose, choices), (self._worker.begin, texts)):
            if wanted := [request for request in requests if not request.over]:
                run(wanted)
        self._worker.step()
        return True

    def _busy(self) -> bool:
        return bool(self._jobs or len(self._waiting) or self._worker.writers)

    def _due(self) -> bool:
        return bool(
            self._give_up
            or self._jobs
            or self._worker.writers
            or self._choice_due()
            or self._waiting.count(GenerateParams)
        )

    def _choice_due(self) -> bool:
        oldest = self._waiting.oldest(ClassifyParams)
        return oldest is not None and (
            self._closed
            or self._waiting.count(ClassifyParams) >= self._worker.most_choices
            or time.monotonic() - oldest >= self._limits.max_wait / 1000
        )

    def _pause(self) -> float | None:
        """Seconds until the oldest choice has waited long enough; none: until something comes."""
        oldest = self._waiting.oldest(ClassifyParams)
        return None if oldest is None else max(oldest + self._limits.max_wait / 1000 - time.monotonic(), 0.0)

    def _fail_all(self, error: EngineClosed) -> None:
        with self._wake:
            self._closed = True
            writing = [request for writer in self._worker.writers for request in writer.requests]
            # What was taken and is in no batch yet, or not done yet, is in nobody else's hands.
            for request in (*self._waiting.everyone(), *writing, *self._taken):
                request.fail(error)
            self._waiting.drop(lambda request: True)
            for _, done in (*self._jobs, *self._doing):
                _settle(done.set_exception, error)
            self._jobs.clear()


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    with suppress(InvalidStateError):  # another thread was first
        settle(value)
