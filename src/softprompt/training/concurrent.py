"""Train several runs concurrently over one frozen backbone: one forward and backward pass over the rows of all.

An add-on to the training loop, which it does not change. Each run executes the ordinary loop in a thread of its own,
one thread at a time, with its own prompt, optimizer, schedule, rows, checkpoints and random state. Where a run would
compute a gradient it waits; when all runs wait, one shared pass computes the gradients of all. Each result equals that
of the run by itself, up to the rounding of products over more rows.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.files import one_line
from softprompt.training.callbacks import Interrupted, interruptible
from softprompt.training.step import Differentiate, GradientRequest, GradientResult, differentiate

T = TypeVar("T")

Job = Callable[[Differentiate], T]
"""Trains a run from beginning to end, given the function that computes its gradients."""


def run_concurrently(
    jobs: Iterable[Job[T]], count: int, on_note: Callable[[str], None] = lambda text: None
) -> Iterator[T]:
    """Yield what each job returns, as it ends; up to `count` run at a time, and the next starts when one ends.

    Args:
        on_note: called if fewer runs can share a pass than were asked for.

    Raises:
        Interrupted: a job was interrupted; the others have saved a checkpoint or ended by then.
        Exception: a job raised it; the others are stopped where they are.
    """
    if count == 1:
        for job in jobs:
            yield job(differentiate)
        return
    pending, shared_pass = map(_JobThread, jobs), _SharedPass(on_note)
    paused: deque[_JobThread[T]] = deque()
    running: list[_JobThread[T]] = []
    interrupted: Interrupted | None = None

    def close() -> None:
        for job in (*paused, *running):
            job.close()

    with ExitStack() as stack:
        stack.enter_context(interruptible())  # so that a job started after a Ctrl-C knows of it
        stack.callback(close)
        while True:
            shared_pass.compute(running)
            paused, running = deque(running), []
            while paused or (interrupted is None and len(running) < count):
                current = paused.popleft() if paused else next(pending, None)
                if current is None:
                    break
                running.append(current)
                try:
                    ended = current.run_until_request()
                except Interrupted as error:
                    running.remove(current)
                    interrupted = error
                    continue
                except BaseException:
                    running.remove(current)
                    raise
                if ended:
                    running.remove(current)
                    yield current.returned
            if not running:
                break
    if interrupted is not None:
        raise interrupted


class _JobClosed(BaseException):
    """Ends a job in its thread; no job catches it."""


class _Computed(NamedTuple):
    """The loss of a request, whose gradient has been added to the parameters, and the request's share of the time."""

    loss: Tensor
    seconds: float


class _RandomState(NamedTuple):
    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def current(cls) -> "_RandomState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def equals(self, other: "_RandomState") -> bool:
        pairs = zip((self.cpu, *self.cuda), (other.cpu, *other.cuda), strict=False)
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@final
class _JobThread(Generic[T]):
    """A job in a thread of its own, which works only while `run_until_request` waits for it."""

    returned: T

    def __init__(self, job: Job[T]) -> None:
        self.request: GradientRequest | None = None
        """The gradient that the job waits for."""
        self.answer: _Computed | Exception | None = None
        """The answer to the request, for when the job continues."""
        self.draws_random: bool | None = None
        """Whether its forward pass uses random numbers; unknown before the first pass."""
        self._random_state: _RandomState | None = None
        self._job = job
        self._error: BaseException | None = None
        self._ended = self._closing = False
        self._resume, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="softprompt-training", daemon=True)

    def run_until_request(self) -> bool:
        """Let the job work until it requests a gradient or ends; return whether it has ended.

        Raises:
            Exception: the job raised it.
        """
        self.request = None
        with self._own_random_state():
            self._continue()
        if self._error is not None:
            raise self._error
        return self._ended

    def close(self) -> None:
        """End the job where it is, so that its files are closed and its locks released."""
        self._closing = True
        if self._thread.ident is not None and not self._ended:
            self._continue()

    def run_single(self) -> None:
        """Compute the requested gradient in a pass of its own."""
        assert self.request is not None
        with self._own_random_state():
            before, started = _RandomState.current(), time.perf_counter()
            try:
                loss = differentiate(self.request).loss
                if loss.is_cuda:
                    torch.cuda.synchronize(loss.device)
                self.answer = _Computed(loss, time.perf_counter() - started)
            except Exception as error:
                self.answer = error
            self.draws_random = not before.equals(_RandomState.current())

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """The job's own random state during the block, continued from the last time."""
        outer = _RandomState.current()
        if self._random_state is not None:
            self._random_state.restore()
        try:
            yield
        finally:
            self._random_state = _RandomState.current()
            outer.restore()

    def _continue(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._resume.release()
        self._pause.acquire()

    def _run(self) -> None:
        try:
            self.returned = self._job(self._request_gradient)
        except _JobClosed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._pause.release()

    def _request_gradient(self, request: GradientRequest) -> GradientResult:
        """The job's `differentiate`, in its own thread: pause until the request has been answered."""
        asked = time.perf_counter()
        self.request = request
        self._pause.release()
        self._resume.acquire()
        if self._closing:
            raise _JobClosed
        answer, self.answer = self.answer, None
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return GradientResult(answer.loss, time.perf_counter() - asked - answer.seconds)


@final
class _SharedPass:
    """Answers the gradient requests of all jobs, with one pass for those that can share it."""

    def __init__(self, on_note: Callable[[str], None]) -> None:
        self._on_note = on_note
        self._max_jobs: dict[Hashable, int] = {}
        """The most jobs in one pass by sharing key, after a larger pass has failed."""

    def compute(self, jobs: Sequence[_JobThread[Any]]) -> None:
        """Answer each job's request."""
        groups: dict[Hashable, list[_JobThread[Any]]] = {}
        for job in jobs:
            assert job.request is not None
            # A job that draws random numbers in its pass, or may, needs a pass of its own.
            key = job.request.training_step.sharing_key if job.draws_random is False else id(job)
            groups.setdefault(key, []).append(job)
        for key, group in groups.items():
            most = self._max_jobs.get(key, len(group))
            for start in range(0, len(group), most):
                self._compute_group(key, group[start : start + most])

    def _compute_group(self, key: Hashable, jobs: Sequence[_JobThread[Any]]) -> None:
        problem = ""
        if len(jobs) > 1:
            try:
                if _compute_in_one_pass(jobs):
                    return
            except Exception as error:
                problem = one_line(error)
        # One by one, so that an error reaches only the run that it belongs to.
        for job in jobs:
            job.run_single()
        if problem and not any(isinstance(job.answer, Exception) for job in jobs):
            self._max_jobs[key] = len(jobs) // 2
            self._on_note(
                f"a pass of {len(jobs)} runs failed and a pass of each did not ({problem}); from here on at most "
                f"{self._max_jobs[key]} share one"
            )


def _compute_in_one_pass(jobs: Sequence[_JobThread[Any]]) -> bool:
    """Answer all requests with one pass; False, with nothing changed, if a loss or gradient is not finite."""
    started, requests = time.perf_counter(), [job.request for job in jobs if job.request]
    parameters = [list(request.training_step.prompted.parameters()) for request in requests]
    losses, gradients = _losses_and_gradients(requests, [parameter for group in parameters for parameter in group])
    if not all(bool(tensor.isfinite().all()) for tensor in (losses, *gradients) if tensor is not None):
        return False
    seconds, rows = time.perf_counter() - started, sum(len(request.rows) for request in requests)
    remaining = iter(gradients)
    for job, group, loss, request in zip(jobs, parameters, losses, requests, strict=True):
        for parameter, gradient in zip(group, remaining, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        job.answer = _Computed(loss, seconds * len(request.rows) / rows)
    return True


def _losses_and_gradients(
    requests: Sequence[GradientRequest], parameters: Sequence[Tensor]
) -> tuple[Float[Tensor, " request"], Sequence[Tensor | None]]:
    """The loss of each request, and the gradients of their sum."""
    prompts = [request.training_step.prompted.prompt for request in requests]
    rows = [row for request in requests for row in request.rows]
    counts = [len(request.rows) for request in requests]
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    with requests[0].training_step.backbone_modes():
        index = torch.tensor(numbers, device=requests[0].training_step.prompted.backbone.device)
        row_losses = requests[0].training_step.objective.losses(
            rows, [prompt for prompt in prompts if prompt is not None], index
        )
        parts = torch.split(row_losses, counts)
        losses = torch.stack([part.sum() / request.weight for part, request in zip(parts, requests, strict=True)])
        # Not `backward`: a pass that fails must not leave gradients in the parameters.
        return losses.detach(), torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
