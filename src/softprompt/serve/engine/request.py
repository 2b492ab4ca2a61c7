"""One row that waits for its answer, and how it can fail."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from softprompt.models import Sampling
from softprompt.serve.prompts.entry import PromptEntry


class PromptNotFound(LookupError):
    """There is no prompt of that name."""


class QueueFull(RuntimeError):
    """The line is full; `after` seconds from now there should be room."""

    def __init__(self, waiting: int, after: float) -> None:
        super().__init__(f"{waiting} rows are waiting, which is all that may; try again in {after:.0f} seconds")
        self.after = after


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class Cancelled(RuntimeError):
    """Nobody wants the answer any more."""


@final
@dataclass(frozen=True, kw_only=True)
class ClassifyParams:
    """Choose among candidates: their tokens, as `PromptedModel.score` takes them."""

    candidates: tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """Write up to `max_new_tokens` tokens."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[int, ...] = ()
    """Ids that end the text; they are not part of it."""


@final
@dataclass(frozen=True, kw_only=True)
class ClassifyOutput:
    """The answer to a `Choice`."""

    scores: tuple[float, ...]
    """Log-probability of each candidate."""


@final
@dataclass(frozen=True, kw_only=True)
class GenerateOutput:
    """The answer to a `Writing`."""

    tokens: tuple[int, ...]
    finish: str
    """`stop`: it came to an end; `length`: it was cut."""


@final
class EngineRequest:
    """A row in line, and the promise of its answer.

    Args:
        served: the prompt as it was when the row came; replacing or removing the prompt changes nothing for the row.
        ids: the row's tokens.
        work: what is asked for.
        timeout: seconds that the answer may take; none: any.
        on_token: called in the engine's thread with each token as it is written; it must not block.
        pixels: the row's image, where it is one and has no tokens.
    """

    def __init__(
        self,
        served: PromptEntry,
        ids: Sequence[int],
        work: ClassifyParams | GenerateParams,
        *,
        timeout: float | None = None,
        on_token: Callable[[int], None] | None = None,
        pixels: Float[Tensor, "channel height width"] | None = None,
    ) -> None:
        self.served = served
        self.ids = tuple(ids)
        self.work = work
        self.pixels = pixels
        self.arrived = time.monotonic()
        self.deadline = None if timeout is None else self.arrived + timeout
        self.future: Future[Any] = Future()
        self.tokens: list[int] = []
        self.counted: int | None = None
        """Tokens up to the stop that ended the text, where the engine had written more."""
        self._on_token = on_token

    @property
    def written(self) -> int:
        """Tokens of its answer."""
        return len(self.tokens) if self.counted is None else self.counted

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.future.done()

    def result(self, timeout: float | None = None) -> Any:
        """`ClassifyOutput` or `GenerateOutput`, when it is there.

        Raises:
            TimeoutError: it took longer than it may.
            Cancelled, Closed: it was given up.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Give it up; its place in the batch is free at the next step."""
        self.fail(Cancelled("the request was cancelled"))

    def answer(self, value: ClassifyOutput | GenerateOutput) -> None:
        """Settle it, unless it was given up meanwhile."""
        self._settle(lambda: self.future.set_result(value))

    def fail(self, error: BaseException) -> None:
        """Settle it with an error, unless it is settled."""
        self._settle(lambda: self.future.set_exception(error))

    def expire(self, now: float) -> None:
        """Fail it if its time is over."""
        if self.deadline is not None and now > self.deadline:
            seconds = self.deadline - self.arrived
            self.fail(TimeoutError(f"no answer within {seconds:g} seconds; ask for less, or try again later"))

    def write(self, token: int) -> None:
        """Take the next token of a `Writing`, and settle it where that was the last."""
        work = self.work
        assert isinstance(work, GenerateParams)
        if token in work.stop:
            self.answer(GenerateOutput(tokens=tuple(self.tokens), finish="stop"))
            return
        self.tokens.append(token)
        if self._on_token is not None:
            self._on_token(token)
        if len(self.tokens) >= work.max_new_tokens:
            self.answer(GenerateOutput(tokens=tuple(self.tokens), finish="length"))

    def _settle(self, settle: Callable[[], None]) -> None:
        if not self.future.done():
            try:
                settle()
            except InvalidStateError:  # another thread was first
                return


def overflow(request: EngineRequest) -> FloatingPointError:
    """The error of a row for which the model gives no numbers."""
    return FloatingPointError(
        f"prompt {request.served.name!r} overflows in the model on this row; train it again, or use another dtype"
    )
