"""Trainings driven to their ends, one or several at a time: a step of each, and one pass over the rows of all.

Each keeps its own prompt, optimiser, schedule, rows, checkpoints and random numbers, so that its result is that of a
run by itself, but for the rounding of products over more rows. What is shared is the frozen backbone and its pass.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.optimise import Given, Steps, Wanted
from softprompt.watch import Interrupted, interruptible

T = TypeVar("T")


def alone(training: Steps[T]) -> T:
    """What `training` returns, driven by itself."""
    [result] = together([training], 1)
    return result


def together(trainings: Iterable[Steps[T]], count: int, note: Callable[[str], None] = lambda text: None) -> Iterator[T]:
    """What each training returns, as it ends; up to `count` are at work at a time, and the next begins where one ends.

    Args:
        note: told where fewer share a pass than might.

    Raises:
        Interrupted: one of them was; all that are at work have then saved what they have, or ended.
        Exception: what a training raises; the others are left where they are.
    """
    waiting, passes = map(_Going, trainings), _Passes(note)
    stepped: deque[_Going[T]] = deque()
    going: list[_Going[T]] = []
    stopped: Interrupted | None = None

    def close() -> None:
        for one in (*stepped, *going):
            one.training.close()

    with ExitStack() as held:
        if count > 1:  # so that a Ctrl-C is known to all, also to one that begins another run after it
            held.enter_context(interruptible())
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
                    one.advance()
                except StopIteration as end:
                    going.remove(one)
                    yield end.value
                except Interrupted as error:
                    going.remove(one)
                    stopped = error
            if not going:
                break
    if stopped is not None:
        raise stopped


@final
class _Going(Generic[T]):
    """A training that has been begun."""

    def __init__(self, training: Steps[T]) -> None:
        self.training = training
        self.wanted: Wanted | None = None
        self.given: Given | Exception | None = None
        self.draws: bool | None = None
        """Whether its pass takes random numbers; not known before its first."""
        self._random: tuple[Tensor, list[Tensor]] | None = None

    def advance(self) -> None:
        """Give it what it waits for, and let it work up to the next time that it waits."""
        given, self.given, self.wanted = self.given, None, None
        with self.randomness():
            if isinstance(given, Exception):
                self.wanted = self.training.throw(given)
            else:
                self.wanted = self.training.send(given)  # type: ignore[arg-type]

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
        wanted, start = self.wanted, time.perf_counter()
        with self.randomness():
            before = _random_state()
            try:
                with wanted.optimiser.modes():
                    loss = wanted.optimiser.losses(wanted.rows).sum() / wanted.weight
                    loss.backward()  # type: ignore[no-untyped-call]
                _wait(loss)
                self.given = Given(loss.detach(), time.perf_counter() - start)
            except Exception as error:
                self.given = error
            self.draws = not _same(before, _random_state())


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
            kinds.setdefault(id(one) if one.draws is not False else one.wanted.optimiser.kind, []).append(one)
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
    parameters = [list(one.optimiser.attachment.parameters()) for one in wanted]
    try:
        losses, found = _differentiated(wanted, [one for own in parameters for one in own])
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    if not all(bool(one.isfinite().all()) for one in (losses, *found) if one is not None):
        return ""  # whose it is will be seen
    _wait(losses)
    seconds, rows = time.perf_counter() - start, sum(len(one.rows) for one in wanted)
    gradients = iter(found)
    for one, own, loss, want in zip(going, parameters, losses, wanted, strict=True):
        for parameter, gradient in zip(own, gradients, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        one.given = Given(loss, seconds * len(want.rows) / rows)
    return None


def _differentiated(
    wanted: Sequence[Wanted], parameters: Sequence[Tensor]
) -> tuple[Float[Tensor, " training"], Sequence[Tensor | None]]:
    """The loss of each, and the gradients of their sum."""
    prompts = [one.optimiser.attachment.prompt for one in wanted]
    rows = [row for one in wanted for row in one.rows]
    counts = torch.tensor([len(one.rows) for one in wanted])
    with wanted[0].optimiser.modes():
        index = torch.arange(len(wanted)).repeat_interleave(counts)
        each = wanted[0].optimiser.losses(rows, [prompt for prompt in prompts if prompt is not None], index)
        sums = torch.split(each, counts.tolist())
        losses = torch.stack([part.sum() / one.weight for part, one in zip(sums, wanted, strict=True)])
        # Not `backward`: a pass that fails must leave no gradient behind.
        return losses.detach(), torch.autograd.grad(losses.sum(), parameters, allow_unused=True)


def _wait(loss: Tensor) -> None:
    """Until a GPU has done what it was given, so that seconds are those of the work."""
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=False))
