"""The engine's thread: each step runs jobs, one batch of classifications and one token of every generation."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch

from softprompt.serve.engine.limits import Limits
from softprompt.serve.engine.queue import RequestQueue
from softprompt.serve.engine.request import (
    SHUT_DOWN,
    SHUTTING_DOWN,
    ClassifyParams,
    EngineClosed,
    EngineRequest,
    GenerateParams,
)
from softprompt.serve.engine.runner import ModelRunner
from softprompt.serve.engine.threads import JOIN_TIMEOUT

_log = logging.getLogger("softprompt.serve")
_MAX_PREFILLS = 8
"""New generations per step, so that running ones are not kept waiting."""
_MIN_STEP_TIMEOUT = 60.0
"""Seconds that any step may last before the thread counts as stuck."""


@final
class _Job:
    """A function to call between two steps, with a future for its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def run(self) -> None:
        if self.future.done():  # its caller has given up
            return
        try:
            result = self.function()
        except BaseException as error:
            self.fail(error)
        else:
            with suppress(InvalidStateError):
                self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # done already, perhaps by another thread
            self.future.set_exception(error)


@final
@dataclass(frozen=True)
class _Step:
    """The work of one step."""

    jobs: list[_Job] = field(default_factory=list)
    classify: list[EngineRequest] = field(default_factory=list)
    generate: list[EngineRequest] = field(default_factory=list)


@final
class Scheduler:
    """Owns the thread in which the model runs; other threads submit requests, and jobs to run between two steps.

    However the thread ends, every request and job gets a result or an error.

    Args:
        runner: runs the batches, in this thread only.
        limits: batch waiting time, queue size and timeout.
    """

    def __init__(self, runner: ModelRunner, limits: Limits) -> None:
        self._runner, self._limits = runner, limits
        self._jobs: deque[_Job] = deque()
        self._queue = RequestQueue(limits.max_queued)
        self._step = _Step()
        self._step_started: float | None = None
        self._wake = threading.Condition()
        self._closed, self._abort = False, False
        self._thread = threading.Thread(target=self._run, name="softprompt-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and its current step has not exceeded the time limit."""
        started = self._step_started
        return self._thread.is_alive() and (started is None or time.monotonic() - started < self._step_timeout)

    @property
    def closed(self) -> bool:
        """Whether new requests are refused, for good."""
        return self._closed

    def queued_by_prompt(self) -> dict[str, int]:
        """Rows in the queue, by prompt."""
        with self._wake:
            return self._queue.count_by_prompt()

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue all of the requests, or none.

        Raises:
            QueueFull, EngineClosed: the engine accepts no requests now, or ever again.
        """
        with self._wake:
            self._check_open()
            self._queue.drop_done()
            self._queue.put(requests, self._runner.seconds_per_row)
            self._wake.notify()

    def run_job(self, function: Callable[[], Any]) -> Any:
        """Call `function` in the engine's thread between two steps, and return its result.

        Raises:
            EngineClosed: the engine is shut down.
            TimeoutError: the thread was busy for too long; `function` will not run.
        """
        job = _Job(function)
        with self._wake:
            self._check_open()
            self._jobs.append(job)
            self._wake.notify()
        if not wait([job.future], self._step_timeout).done:
            job.future.cancel()
            raise TimeoutError(
                f"the engine was busy for {self._step_timeout:g} seconds, and nothing has changed; try again later"
            )
        return job.future.result()

    def close(self, grace: float) -> None:
        """Refuse new requests and finish the others; those left after `grace` seconds fail with `EngineClosed`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(grace)
        with self._wake:
            self._abort = True
            self._wake.notify()
        self._thread.join(JOIN_TIMEOUT)
        if self._thread.is_alive():
            _log.error("the engine's thread is stuck and was abandoned")
            self._fail_all(EngineClosed(SHUT_DOWN))

    @property
    def _step_timeout(self) -> float:
        return max(self._limits.timeout, _MIN_STEP_TIMEOUT)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(SHUTTING_DOWN)

    def _run(self) -> None:
        reason = SHUT_DOWN
        try:
            with torch.no_grad():
                while self._schedule():
                    self._execute(self._step)
                    self._step = _Step()  # an idle engine keeps no request, nor its prompt's keys and values
        except BaseException:
            reason = "the engine failed and accepts no more requests; see the service's log, then restart it"
            _log.exception("the engine's thread ended")
        finally:
            self._fail_all(EngineClosed(reason))

    def _schedule(self) -> bool:
        """Wait for work and choose that of the next step; False once the engine has ended."""
        with self._wake:
            self._step_started = None
            while not self._has_due_work():
                if self._closed and not len(self._queue):
                    return False
                self._wake.wait(self._seconds_until_due())
            if self._abort:
                return False
            self._step_started = now = time.monotonic()
            jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
            self._step = _Step(jobs)
            for request in (*self._queue, *self._runner.generating):
                request.expire(now)
            self._queue.drop_done()
            classify = (
                self._queue.take(ClassifyParams, self._runner.max_classify_batch, similar_length=True)
                if self._classify_due()
                else []
            )
            free = self._runner.max_batch - len(self._runner.generating)
            self._step = _Step(jobs, classify, self._queue.take(GenerateParams, min(_MAX_PREFILLS, free)))
            return True

    def _execute(self, step: _Step) -> None:
        for job in step.jobs:
            job.run()
        step.jobs.clear()  # their results hold prompts' keys and values
        self._runner.drop_done()
        if classify := [request for request in step.classify if not request.done]:
            self._runner.classify(classify)
        if generate := [request for request in step.generate if not request.done]:
            self._runner.prefill(generate)
        self._runner.decode()

    def _has_due_work(self) -> bool:
        return bool(
            self._abort
            or self._jobs
            or self._runner.batches
            or self._classify_due()
            or self._queue.count(GenerateParams)
        )

    def _classify_due(self) -> bool:
        """Whether a batch of classifications is full, or its oldest request has waited long enough."""
        oldest = self._queue.oldest_arrival(ClassifyParams)
        return oldest is not None and (
            self._closed
            or self._queue.count(ClassifyParams) >= self._runner.max_classify_batch
            or time.monotonic() - oldest >= self._limits.max_wait / 1000
        )

    def _seconds_until_due(self) -> float | None:
        """Seconds until the oldest classification has waited long enough; None: until something arrives."""
        oldest = self._queue.oldest_arrival(ClassifyParams)
        return None if oldest is None else max(oldest + self._limits.max_wait / 1000 - time.monotonic(), 0.0)

    def _fail_all(self, error: EngineClosed) -> None:
        with self._wake:
            self._closed = True
            # Requests of the current step may be neither in the queue nor in a batch.
            for request in (*self._queue, *self._runner.generating, *self._step.classify, *self._step.generate):
                request.fail(error)
            self._queue.drop_done()
            for job in (*self._jobs, *self._step.jobs):
                job.fail(error)
            self._jobs.clear()
