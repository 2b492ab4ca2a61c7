"""From the engine's thread to a client: waiting, streaming, and giving up when nobody listens."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, final

from fastapi import Request

from softprompt.serve.api.middleware import Record
from softprompt.serve.engine.detokenizer import IncrementalDetokenizer
from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.request import Cancelled, EngineRequest

Result = TypeVar("Result")
_SLACK = 5.0
"""Seconds beyond a row's deadline in which the engine may be in the middle of a pass."""


@final
class Answer:
    """One text that is being written, as it comes."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._text = IncrementalDetokenizer(tokenizer, stops)
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self.request: EngineRequest | None = None
        self.finish = ""
        """Why it ended: `stop` or `length`."""

    def begin(self, ask: Callable[[Callable[[int], None]], EngineRequest]) -> EngineRequest:
        """Put it in line; in any thread."""
        self.request = ask(lambda token: self._put(token))
        self.request.future.add_done_callback(lambda _: self._put(None))
        return self.request

    async def pieces(self) -> AsyncIterator[str]:
        """Its text, piece by piece; raises what the engine raised."""
        assert self.request is not None
        while (token := await self._next(self.request)) is not None:
            if piece := self._text.add(token):
                yield piece
            if self._text.stopped:
                self.finish = "stop"
                self._counted()
                self.request.cancel()
                return
        result = self.request.result(0.0)
        if piece := self._text.end():
            yield piece
        self._counted()
        self.finish = "stop" if self._text.stopped else result.finish

    def _counted(self) -> None:
        """What the answer is billed by: the engine may have written on behind a stop."""
        assert self.request is not None
        self.request.counted = self._text.count

    async def whole(self) -> str:
        """All of it."""
        return "".join([piece async for piece in self.pieces()])

    async def _next(self, request: EngineRequest) -> int | None:
        """The engine ends a row at its deadline; one that is stuck does not."""
        if not self._tokens.empty():  # where no time is left, `wait_for` gives up without looking
            return self._tokens.get_nowait()
        left = None if request.deadline is None else request.deadline + _SLACK - time.monotonic()
        try:
            return await asyncio.wait_for(self._tokens.get(), left)
        except TimeoutError:
            raise TimeoutError("no answer within its time; try again later") from None

    def _put(self, token: int | None) -> None:
        with suppress(RuntimeError):  # the service's loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, token)


async def wait_or_cancel(request: Request, engine: Engine, work: Awaitable[Result]) -> Result:
    """What `work` gives, unless the client goes away or time is over first.

    Raises:
        Cancelled: nobody listens any more.
        TimeoutError: it took longer than an answer may.
    """
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answer, gone), timeout=engine.limits.timeout + _SLACK, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise Cancelled("the client went away")
        raise TimeoutError(f"no answer within {engine.limits.timeout:g} seconds; ask for less, or try again later")
    finally:
        for task in (answer, gone):
            task.cancel()


async def results(requests: Sequence[EngineRequest]) -> list[Any]:
    """Every ticket's answer, or the first error."""
    return list(await asyncio.gather(*(asyncio.wrap_future(request.future) for request in requests)))


def record_of(request: Request) -> Record:
    """What the log will say of the request."""
    record: Record = request.scope["record"]
    return record


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
