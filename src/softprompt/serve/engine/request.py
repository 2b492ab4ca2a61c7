"""A row on its way through the engine, its result, and the errors that end it."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import final

from jaxtyping import Float
from torch import Tensor

from softprompt.models import Sampling
from softprompt.serve.engine.logits import TokenLogprob
from softprompt.serve.prompts.entry import PromptEntry

SHUTTING_DOWN = "the service is shutting down; send the request to another replica, or again later"
SHUT_DOWN = "the service shut down before the request was done; send it to another replica, or again later"


class PromptNotFound(LookupError):
    """No prompt has that name."""


class InvalidParameter(ValueError):
    """A field of a request that the model or the engine's limits do not allow; `param` is its name in the API."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param} {problem}")
        self.param = param


class QueueFull(RuntimeError):
    """The queue has no room; a retry after `retry_after` seconds should succeed."""

    def __init__(self, queued: int, retry_after: float) -> None:
        super().__init__(f"the queue is full ({queued} rows); try again in {retry_after:.0f} seconds")
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine accepts no more requests."""


class EngineUnavailable(RuntimeError):
    """The server that runs the model fails or does not answer."""


class Cancelled(RuntimeError):
    """The request was cancelled by its caller."""


@final
@dataclass(frozen=True, kw_only=True)
class ClassifyParams:
    """Score candidates: their token ids, as `PromptedModel.score` takes them."""

    candidates: tuple[tuple[int, ...], ...]


@final
@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """Generate up to `max_new_tokens` tokens."""

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[int, ...] = ()
    """Token ids that end the text and are not part of it."""
    logprobs: int | None = None
    """Report each token's log-probability, and this many of the most likely tokens; None: report nothing."""
    score_input: bool = False
    """Report the log-probabilities of the input's tokens too."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits, by token id."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that was generated before."""
    frequency_penalty: float = 0.0
    """Subtracted once per earlier occurrence of the token."""

    @property
    def adjusts_logits(self) -> bool:
        """Whether the next token is chosen from other logits than the model's."""
        return bool(self.logit_bias or self.presence_penalty or self.frequency_penalty)


RequestKind = type[ClassifyParams] | type[GenerateParams]


@final
@dataclass(frozen=True, kw_only=True)
class ClassifyOutput:
    """The result of a classification."""

    logprobs: tuple[float, ...]
    """Natural log-probability of each candidate: over the vocabulary, summed over its tokens, or over a head's
    classes."""


@final
@dataclass(frozen=True, kw_only=True)
class GenerateOutput:
    """The result of a generation."""

    tokens: tuple[int, ...]
    finish_reason: str
    """`stop`: a stop token ended the text; `length`: it reached `max_new_tokens`."""


@final
class EngineRequest:
    """One row to classify or to continue, with a future for its result.

    Args:
        entry: the prompt as it is now; replacing or removing the prompt later does not affect this request.
        ids: the row's token ids.
        params: what to compute.
        timeout: seconds that the request may take; None: unlimited.
        arrived: when it came, from which its time counts, as `time.monotonic`; None: now.
        on_token: called in the engine's thread with each generated token; it must not block.
        pixels: the image of a row that is an image and has no tokens.
    """

    def __init__(
        self,
        entry: PromptEntry,
        ids: Sequence[int],
        params: ClassifyParams | GenerateParams,
        *,
        timeout: float | None = None,
        arrived: float | None = None,
        on_token: Callable[[int], None] | None = None,
        pixels: Float[Tensor, "channel height width"] | None = None,
    ) -> None:
        self.entry = entry
        self.ids = tuple(ids)
        self.params = params
        self.pixels = pixels
        self.arrived = time.monotonic() if arrived is None else arrived
        self.deadline = None if timeout is None else self.arrived + timeout
        self.future: Future[ClassifyOutput | GenerateOutput] = Future()
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        """If asked for: of each of `tokens`, then of the stop token that ended the text."""
        self.input_logprobs: tuple[TokenLogprob, ...] = ()
        """If asked for: of the input's tokens from the second on."""
        self.length_at_stop: int | None = None
        """Tokens up to the one that completed a stop text; the engine may have generated further ones."""
        self._on_token = on_token

    @property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """The candidates of a classification."""
        assert isinstance(self.params, ClassifyParams)
        return self.params.candidates

    @property
    def generation(self) -> GenerateParams:
        """The parameters of a generation."""
        assert isinstance(self.params, GenerateParams)
        return self.params

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, up to a stop text."""
        return len(self.tokens) if self.length_at_stop is None else self.length_at_stop

    @property
    def done(self) -> bool:
        """Whether it has a result or an error."""
        return self.future.done()

    def result(self, timeout: float | None = None) -> ClassifyOutput | GenerateOutput:
        """Wait for the `ClassifyOutput` or `GenerateOutput`.

        Raises:
            TimeoutError: the request, or this call, took longer than its timeout.
            Cancelled, EngineClosed: the request was given up.
        """
        return self.future.result(timeout)

    def cancel(self) -> None:
        """Give the request up; its place in the batch is free at the next step."""
        self.fail(Cancelled("the request was cancelled"))

    def finish(self, output: ClassifyOutput | GenerateOutput) -> None:
        """Set the result, unless the request is done."""
        with suppress(InvalidStateError):  # done already, perhaps by another thread
            self.future.set_result(output)

    def fail(self, error: BaseException) -> None:
        """Set an error, unless the request is done."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def expire(self, now: float) -> None:
        """Fail the request if its deadline has passed."""
        if self.deadline is not None and now > self.deadline:
            seconds = self.deadline - self.arrived
            self.fail(TimeoutError(f"no answer within {seconds:g} seconds; ask for less, or try again later"))

    def append_token(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Add the next token of a generation, and finish the request if it was the last one."""
        if not self.generation.max_new_tokens:  # only the input is scored
            self.finish(GenerateOutput(tokens=(), finish_reason="length"))
            return
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.generation.stop:
            self.finish(GenerateOutput(tokens=tuple(self.tokens), finish_reason="stop"))
            return
        self.tokens.append(token)
        if self._on_token is not None:
            self._on_token(token)
        if len(self.tokens) >= self.generation.max_new_tokens:
            self.finish(GenerateOutput(tokens=tuple(self.tokens), finish_reason="length"))


def overflow_error(request: EngineRequest) -> FloatingPointError:
    """The error of a row whose logits are not finite."""
    return FloatingPointError(
        f"prompt {request.entry.name!r} overflows in the model on this row; train it again, or use another dtype"
    )
