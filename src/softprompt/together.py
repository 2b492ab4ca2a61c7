"""Trainings driven to their ends, one or several at a time: a step of each, and one pass over the rows of all.

Each keeps its own prompt, optimiser, schedule, rows, checkpoints and random numbers, so that its result is that of a
run by itself, but for the rounding of products over more rows. What is shared is the frozen backbone and its pass.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from softprompt.optimise import Given, Steps, Wanted
from softprompt.watch import Interrupted

T = TypeVar("T")


def alone(training: Steps[T]) -> T:
    """What `training` returns, driven by itself."""
    [result] = together([training], 1)
    return result


def together(trainings: Iterable[Steps[T]], count: int) -> Iterator[T]:
    """What each training returns, as it ends; up to `count` are at work at a time, and the next begins where one ends.

    Raises:
        Interrupted: one of them was; all that are at work have then saved what they have, or ended.
        Exception: what a training raises; the others are left where they are.
    """
    waiting = map(_Going, trainings)
    stepped: deque[_Going[T]] = deque()
    going: list[_Going[T]] = []
    stopped: Interrupted | None = None
    try:
        while True:
            _give(going)
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
    finally:
        for one in (*stepped, *going):
            one.training.close()
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
                self.given = Given(loss.detach(), time.perf_counter() - start)
            except Exception as error:
                self.given = error
            self.draws = not _same(before, _random_state())


def _give(going: Sequence[_Going[Any]]) -> None:
    """Compute what each of them wants, in one pass for those of a kind."""
    kinds: dict[Any, list[_Going[Any]]] = {}
    for one in going:
        assert one.wanted is not None
        kinds.setdefault(id(one) if one.draws is not False else one.wanted.optimiser.kind, []).append(one)
    for of_a_kind in kinds.values():
        if len(of_a_kind) == 1:
            of_a_kind[0].alone()
        else:
            _give_in_one_pass(of_a_kind)


def _give_in_one_pass(going: Sequence[_Going[Any]]) -> None:
    """One pass for all of them; where it fails, each is computed alone, so that the fault is one training's."""
    start, wanted = time.perf_counter(), [one.wanted for one in going if one.wanted]
    rows = [row for one in wanted for row in one.rows]
    counts = torch.tensor([len(one.rows) for one in wanted])
    attachments = [one.optimiser.attachment for one in wanted]
    prompts = [attachment.prompt for attachment in attachments if attachment.prompt is not None]
    parameters = [list(attachment.parameters()) for attachment in attachments]
    problem: Exception | None = None
    try:
        with wanted[0].optimiser.modes():
            each = wanted[0].optimiser.losses(rows, prompts, torch.arange(len(wanted)).repeat_interleave(counts))
            sums = torch.split(each, counts.tolist())
            losses = torch.stack([part.sum() / one.weight for part, one in zip(sums, wanted, strict=True)])
            # Not `backward`: a pass that fails must leave no gradient behind.
            found = torch.autograd.grad(losses.sum(), [one for own in parameters for one in own], allow_unused=True)
    except Exception as error:
        problem = error
    if problem is not None or not all(bool(one.isfinite().all()) for one in (losses, *found) if one is not None):
        for one in going:
            one.alone()
        if problem is not None and not any(isinstance(one.given, Exception) for one in going):
            sentence = f"{len(going)} trainings at a time failed where each alone did not ({problem}); lower --together"
            for one in going:
                one.given = RuntimeError(sentence)
        return
    gradients = iter(found)
    seconds = time.perf_counter() - start
    for one, own, loss, want in zip(going, parameters, losses.detach(), wanted, strict=True):
        for parameter, gradient in zip(own, gradients, strict=False):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        one.given = Given(loss, seconds * len(want.rows) / len(rows))


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=False))
