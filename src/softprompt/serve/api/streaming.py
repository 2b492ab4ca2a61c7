"""From the engine's thread to a client: token streams, waiting, and cancellation when the client disconnects."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, final

from fastapi import Request

from softprompt.serve.api.middleware import RequestRecord
from softprompt.serve.engine.base import BaseEngine
from softprompt.serve.engine.detokenizer import IncrementalDetokenizer
from softprompt.serve.engine.logits import TokenLogprob
from softprompt.serve.engine.request import Cancelled, EngineRequest, GenerateOutput

Result = TypeVar("Result")
_SLACK = 5.0
"""Seconds after a request's deadline in which the engine may still be in a forward pass."""


@final
class TextStream:
    """The text of one generation as it grows.

    Pass `put` to `Engine.generate` as `on_token`, then call `attach` with the request.

    Args:
        stops: texts that end the answer.
        continues_input: the text is what comes after the input's, with the space between the two.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, continues_input: bool = False) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, stops)
        self._continues_input = continues_input
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self._num_taken = 0
        self.request: EngineRequest | None = None
        self.finish_reason = ""
        """`stop` or `length`, once it has ended."""

    def put(self, token: int | None) -> None:
        """Add a token, or None at the end; from any thread."""
        with suppress(RuntimeError):  # the service's event loop has ended
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, token)

    def attach(self, request: EngineRequest) -> None:
        """Set the request whose tokens this is; from any thread."""
        self.request = request
        if self._continues_input:
            self._detokenizer.continue_after(request.ids)
        request.future.add_done_callback(lambda _: self.put(None))

    async def pieces(self) -> AsyncIterator[str]:
        """The text, piece by piece; raises the request's error."""
        request = self.request
        assert request is not None
        while (token := await self._next_token(request)) is not None:
            if piece := self._detokenizer.add(token):
                yield piece
            if self._detokenizer.stopped:
                self.finish_reason, request.length_at_stop = "stop", self._detokenizer.count
                request.cancel()
                return
        output = request.result(0.0)
        assert isinstance(output, GenerateOutput)
        if piece := self._detokenizer.end():
            yield piece
        request.length_at_stop = self._detokenizer.count
        self.finish_reason = "stop" if self._detokenizer.stopped else output.finish_reason

    @property
    def continues_text(self) -> bool:
        """Whether the answer is decoded as the continuation of its input's text."""
        return self._detokenizer.continues_text

    def take_logprobs(self) -> list[TokenLogprob]:
        """Of the tokens whose text `pieces` has dealt with since the last call.

        They end with the token that completed a stop text, or with the stop token.
        """
        request = self.request
        assert request is not None
        ended_by_engine = bool(self.finish_reason) and not self._detokenizer.stopped
        end = len(request.logprobs) if ended_by_engine else self._detokenizer.count
        start, self._num_taken = self._num_taken, max(end, self._num_taken)
        return request.logprobs[start:end]

    async def _next_token(self, request: EngineRequest) -> int | None:
        """The next token; a time limit of its own, since a stuck engine does not expire requests."""
        if not self._tokens.empty():  # with no time left, `wait_for` would give up without looking
            return self._tokens.get_nowait()
        left = None if request.deadline is None else request.deadline + _SLACK - time.monotonic()
        try:
            return await asyncio.wait_for(self._tokens.get(), left)
        except TimeoutError:
            raise TimeoutError("no answer within its time; try again later") from None


async def wait_or_cancel(request: Request, engine: BaseEngine, work: Awaitable[Result]) -> Result:
    """The result of `work`, unless the client disconnects or the time limit passes first.

    Raises:
        Cancelled: the client disconnected.
        TimeoutError: it took longer than a request may.
    """
    answer = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
    timeout = engine.limits.timeout
    left = record_of(request).arrived + timeout + _SLACK - time.monotonic()
    try:
        await asyncio.wait((answer, disconnected), timeout=max(left, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if disconnected.done():
            raise Cancelled("the client disconnected")
        raise TimeoutError(f"no answer within {timeout:g} seconds; ask for less, or try again later")
    finally:
        for task in (answer, disconnected):
            task.cancel()


async def gather_results(requests: Sequence[EngineRequest]) -> list[Any]:
    """Every request's result, or the first error."""
    return list(await asyncio.gather(*(asyncio.wrap_future(request.future) for request in requests)))


def record_of(request: Request) -> RequestRecord:
    """The record that the middleware logs when the request ends."""
    record: RequestRecord = request.scope["record"]
    return record


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
