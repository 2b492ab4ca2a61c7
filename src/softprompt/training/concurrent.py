"""Several trainings at a time over one frozen backbone: a step of each, and one pass over the rows of all.

Each runs the ordinary loop in a thread of its own, one thread at a time, with its own prompt, optimiser, schedule,
rows, checkpoints and random numbers, so that its result is that of a run by itself, but for the rounding of products
over more rows. What is shared is the frozen backbone and its pass: where a training would compute a gradient it waits
instead, until all of them do, and one pass gives each its own.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.training.callbacks import Interrupted, interruptible
from softprompt.training.step import Differentiate, GradientRequest, GradientResult, differentiate, wait_for_device

T = TypeVar("T")

Work = Callable[[Differentiate], T]
"""A training from its beginning to its end, given who computes its gradients."""


def run_concurrently(
    works: Iterable[Work[T]], count: int, note: Callable[[str], None] = lambda text: None
) -> Iterator[T]:
    """What each training returns, as it ends; up to `count` are at work at a time, and the next begins where one ends.

    Args:
        note: told where fewer share a pass than might.

    Raises:
        Interrupted: one of them was; all that are at work have then saved what they have, or ended.
        Exception: what a training raises; the others are left where they are.
    """
    if count == 1:
        for work in works:
            yield work(differentiate)
        return
    waiting, passes = map(_Going, works), _Passes(note)
    stepped: deque[_Going[T]] = deque()
    going: list[_Going[T]] = []
    stopped: Interrupted | None = None

    def close() -> None:
        for one in (*stepped, *going):
            one.close()

    with ExitStack() as held:
        held.enter_context(interruptible())  # so that a Ctrl-C is known to all, also to one that begins after it
        held.callback(close)
        while True:
            passes.give(going)
            stepped, going = deque(going), []
            while stepped or (stopped is None and len(going) < count):
                one = stepped.popleft() if stepped else next(waiting, None)
                if one is None:
                    break
                going.append(one)
                try:
                    ended = one.advance()
                except Interrupted as error:
                    going.remove(one)
                    stopped = error
                    continue
                except BaseException:
                    going.remove(one)
                    raise
                if ended:
                    going.remove(one)
                    yield one.result
            if not going:
                break
    if stopped is not None:
        raise stopped


class _Closed(BaseException):
    """Ends a training that nobody waits for any more, in its thread; no training catches it."""


@final
class _Going(Generic[T]):
    """A training in a thread of its own, which works only while `advance` waits for it."""

    result: T

    def __init__(self, work: Work[T]) -> None:
        self.wanted: GradientRequest | None = None
        self.given: GradientResult | Exception | None = None
        self.draws: bool | None = None
        """Whether its pass takes random numbers; not known before its first."""
        self._random: tuple[Tensor, list[Tensor]] | None = None
        self._work = work
        self._error: BaseException | None = None
        self._ended = self._closing = False
        self._its_turn, self._our_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="softprompt-training", daemon=True)

    def advance(self) -> bool:
        """Give it what it waits for, and let it work up to the next time that it waits; whether it has ended.

        Raises:
            Exception: what the training raises.
        """
        self.wanted = None
        with self.randomness():
            self._let_work()
        if self._error is not None:
            raise self._error
        return self._ended

    def close(self) -> None:
        """End it where it is: its files are closed and its locks let go."""
        self._closing = True
        if self._thread.ident is not None and not self._ended:
            self._let_work()

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Its own random numbers, which go on where they were left."""
        outside = _random_state()
        if self._random is not None:
            _set_random_state(self._random)
        try:
            yield
        finally:
            self._random = _random_state()
            _set_random_state(outside)

    def alone(self) -> None:
        """Compute what it wants by itself."""
        assert self.wanted is not None
        with self.randomness():
            before = _random_state()
            try:
                self.given = differentiate(self.wanted)
            except Exception as error:
                self.given = error
            self.draws = not _same(before, _random_state())

    def _let_work(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._its_turn.release()
        self._our_turn.acquire()

    def _run(self) -> None:
        try:
            self.result = self._work(self._wait_for)
        except _Closed:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._our_turn.release()

    def _wait_for(self, wanted: GradientRequest) -> GradientResult:
        """In the training's thread, where it wants a gradient."""
        self.wanted = wanted
        self._our_turn.release()
        self._its_turn.acquire()
        if self._closing:
            raise _Closed
        given, self.given = self.given, None
        if isinstance(given, Exception):
            raise given
        assert given is not None
        return given


@final
class _Passes:
    """Computes what trainings want, in one pass for those of a kind."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._most: dict[Hashable, int] = {}
        """Trainings of a kind in one pass, where a larger one has failed."""

    def give(self, going: Sequence[_Going[Any]]) -> None:
        """Compute what each of them wants."""
        kinds: dict[Hashable, list[_Going[Any]]] = {}
        for one in going:
            assert one.wanted is not None
            kinds.setdefault(id(one) if one.draws is not False else one.wanted.training_step.kind, []).append(one)
        for kind, every in kinds.items():
            most = self._most.get(kind, len(every))
            for start in range(0, len(every), most):
                self._share(kind, every[start : start + most])

    def _share(self, kind: Hashable, some: Sequence[_Going[Any]]) -> None:
        problem = _give_in_one_pass(some) if len(some) > 1 else ""
        if problem is None:
            return
        # One by one: a fault is then one training's, and the others never knew of it.
        for one in some:
            one.alone()
        if problem and not any(isinstance(one.given, Exception) for one in some):
            self._most[kind] = len(some) // 2
            self._note(
                f"a pass of {len(some)} trainings failed where each alone did not ({problem}); from here on at most "
                f"{self._most[kind]} share one"
            )


def _give_in_one_pass(going: Sequence[_Going[Any]]) -> str | None:
    """One pass for all of them, or why there is none; then no gradient and nothing of the pass is left."""
    start, wanted = time.perf_counter(), [one.wanted for one in going if one.wanted]
    parameters = [list(one.training_step.prompted.parameters()) for one in wanted]
    try:
        losses, found = _differentiated(wanted, [one for own in parameters for one in own])
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    if not all(bool(one.isfinite().all()) for one in (losses, *found) if one is not None):
        return ""  # whose it is will be seen
    wait_for_device(losses)
    seconds, rows = time.perf_counter() - start, sum(len(one.rows) for one in wanted)
    gradients = iter(found)
    for one, own, loss, want in zip(going, parameters, losses, wanted, strict=True):
        for parameter, gradient in zip(own, gradients, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        one.given = GradientResult(loss, seconds * len(want.rows) / rows)
    return None


def _differentiated(
    wanted: Sequence[GradientRequest], parameters: Sequence[Tensor]
) -> tuple[Float[Tensor, " training"], Sequence[Tensor | None]]:
    """The loss of each, and the gradients of their sum."""
    prompts = [one.training_step.prompted.prompt for one in wanted]
    rows = [row for one in wanted for row in one.rows]
    counts = torch.tensor([len(one.rows) for one in wanted])
    with wanted[0].training_step.modes():
        index = torch.arange(len(wanted)).repeat_interleave(counts)
        each = wanted[0].training_step.losses(rows, [prompt for prompt in prompts if prompt is not None], index)
        sums = torch.split(each, counts.tolist())
        losses = torch.stack([part.sum() / one.weight for part, one in zip(sums, wanted, strict=True)])
        # Not `backward`: a pass that fails must leave no gradient behind.
        return losses.detach(), torch.autograd.grad(losses.sum(), parameters, allow_unused=True)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=False))
