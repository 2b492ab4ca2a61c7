"""An engine over a vLLM server that runs the backbone; rows are sent as embeddings of prompt and text."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import cycle
from typing import Any, final

import torch

from softprompt.backbones import Backbone
from softprompt.export.base import embedding_scale
from softprompt.export.client import label_prefixes, label_scores
from softprompt.models import attach
from softprompt.serve.engine.base import BaseEngine, EngineStatus
from softprompt.serve.engine.limits import Limits
from softprompt.serve.engine.queue import RequestQueue
from softprompt.serve.engine.request import (
    SHUT_DOWN,
    SHUTTING_DOWN,
    ClassifyOutput,
    ClassifyParams,
    EngineClosed,
    EngineRequest,
    EngineUnavailable,
    GenerateOutput,
    GenerateParams,
    InvalidParameter,
    RequestKind,
    overflow_error,
)
from softprompt.serve.engine.threads import JOIN_TIMEOUT
from softprompt.serve.engine.vllm_server import ConnectionLost, Row, VllmServer
from softprompt.serve.prompts.entry import PromptEntry, base_entry, display_name

_log = logging.getLogger("softprompt.serve")
_TICK = 0.25
"""Seconds between checks of deadlines."""
_CHECK_SECONDS = 5.0
"""Seconds between checks of the server's health."""
_MAX_TEMPERATURE = 2.0
"""vLLM's own limit."""
_PREPARE_TIMEOUT = 60.0
"""Seconds in which the server must run a new prompt."""
_UNAVAILABLE = "the vLLM server behind this service does not answer; try again later"


@final
class VllmEngine(BaseEngine):
    """Serves prompts of a decoder that a vLLM server runs; only tokenizer and embedding table are in memory here.

    vLLM batches the rows, and computes prompts that rows share once, in its prefix cache. Labels and greedy texts are
    those of the local engine up to rounding; for a seed, vLLM draws other texts. One thread exchanges all requests.

    When the connection breaks, all requests fail with `EngineUnavailable`, and so do new ones until the server passes
    the first check again.

    Args:
        backbone: of `load_embeddings`.
        url: the server's root.
        key: the server's API key; empty: none.
        limits: `max_batch` is the number of rows sent at the same time; `max_wait` has no effect.

    Raises:
        EngineUnavailable: no vLLM server answers at `url`.
        ValueError: it takes no embeddings or runs another model, or the backbone scales its embeddings.
    """

    def __init__(self, backbone: Backbone, url: str, *, key: str = "", limits: Limits | None = None) -> None:
        limits = limits or Limits()
        if embedding_scale(backbone) != 1.0:
            raise ValueError(
                f"{display_name(backbone)} scales inside its embedding, and engines differ in whether they scale given "
                "vectors; use --engine local"
            )
        super().__init__(backbone, base_entry(backbone), attach(backbone).end_of_sequence(), limits)
        self._server = VllmServer(url, key)
        self._lock, self._queue = threading.Lock(), RequestQueue(limits.max_queued)
        self._running: dict[EngineRequest, asyncio.Task[None]] = {}
        self._seconds_per_row: dict[RequestKind, float] = {ClassifyParams: 0.05, GenerateParams: 0.05}
        self._available, self._closed, self._ended = True, False, False
        self._loop, self._wake = asyncio.new_event_loop(), asyncio.Event()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=[started], name="softprompt-vllm", daemon=True)
        self._thread.start()
        started.result()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs; `status` says whether the vLLM server does."""
        return self._thread.is_alive()

    @property
    def closed(self) -> bool:
        """Whether new requests are refused, for good."""
        return self._closed

    def status(self) -> EngineStatus:
        """A snapshot of the queue and of running generations; `ready` only while the vLLM server answers."""
        with self._lock:
            queued = self._queue.count_by_prompt()
        running = list(self._running.copy())
        return EngineStatus(
            ready=self.alive and self._available and not self._closed,
            prompts=len(self._entries),
            queued=sum(queued.values()),
            queued_by_prompt=queued,
            generating=sum(isinstance(request.params, GenerateParams) for request in running),
            max_batch=self.limits.max_batch,
        )

    def close(self, grace: float = 30.0) -> None:
        """Refuse new requests and finish the others; those left after `grace` seconds fail with `EngineClosed`."""
        with self._lock:
            self._closed = True
        end = time.monotonic() + grace
        while self.alive and self._unfinished() and time.monotonic() < end:
            time.sleep(_TICK / 5)
        self._ended = True
        self._notify()
        self._thread.join(JOIN_TIMEOUT)

    def _complete(self, entry: PromptEntry) -> PromptEntry:
        """Also has the server run the prompt once: finite values in a file may overflow in the model, for every row."""
        if not entry.prompt.plain:
            raise ValueError(
                f"prompt {entry.name!r} also changes the input's own embeddings by a rule of its method, but vLLM "
                "takes vectors alone; use --engine local"
            )
        self._check_length(entry, 1, 1)
        self._check_open()
        probe = self._server.logprobs([self._row(entry, [0])], [0])
        try:
            [values] = asyncio.run_coroutine_threadsafe(probe, self._loop).result(_PREPARE_TIMEOUT)
        except TimeoutError:
            raise TimeoutError("the vLLM server was busy for too long, and nothing has changed; try later") from None
        if not all(map(math.isfinite, values.values())):
            raise self._overflow(entry)
        return entry

    def _submit(self, requests: Sequence[EngineRequest]) -> None:
        for request in requests:
            if isinstance(request.params, ClassifyParams):
                self._check_length(request.entry, len(request.ids), max(map(len, request.candidates)))
            else:
                self._check_length(request.entry, len(request.ids), request.generation.max_new_tokens)
                _check_generation(request.generation)
        with self._lock:
            self._check_open()
            self._queue.drop_done()
            self._queue.put(requests, self._seconds_per_row)
        self._notify()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed(SHUTTING_DOWN)
        if not self._available:
            raise EngineUnavailable(_UNAVAILABLE)

    def _check_length(self, entry: PromptEntry, input_tokens: int, answer_tokens: int) -> None:
        """Check a row against the server's limit, which may be below the model's; vLLM would shorten the answer."""
        length = entry.length + input_tokens + answer_tokens
        if length > self._server.max_row:
            raise ValueError(
                f"the prompt's {entry.length} positions and {input_tokens + answer_tokens} for input and answer exceed "
                f"the {self._server.max_row} of the vLLM server; shorten the input or ask for fewer tokens"
            )

    @torch.no_grad()
    def _row(self, entry: PromptEntry, ids: Sequence[int]) -> Row:
        text = self.backbone.model.get_input_embeddings()(torch.tensor(ids))
        return torch.cat([entry.prompt.prompt().to(text.dtype), text])

    def _unfinished(self) -> list[EngineRequest]:
        with self._lock:
            return [*self._queue, *self._running.copy()]

    def _notify(self) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._wake.set)

    def _run(self, started: Future[None]) -> None:
        """The thread: everything from here on runs in its event loop."""
        try:
            self._loop.run_until_complete(self._serve(started))
        except BaseException as error:
            if started.done():
                _log.exception("the engine's thread ended")
            else:
                started.set_exception(error)
        finally:
            with self._lock:
                self._closed = True
            self._fail(self._unfinished(), EngineClosed(SHUT_DOWN))
            self._loop.run_until_complete(self._server.close())
            self._loop.close()

    async def _serve(self, started: Future[None]) -> None:
        await self._server.check(self.backbone)
        started.set_result(None)
        watching = asyncio.create_task(self._watch())
        while not self._ended:
            now = time.monotonic()
            for request in self._unfinished():
                request.expire(now)
            if self._available:
                self._start_requests()
            else:
                self._fail(self._unfinished(), EngineUnavailable(_UNAVAILABLE))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _TICK)
            self._wake.clear()
        tasks = [watching, *self._running.values()]
        self._fail(self._unfinished(), EngineClosed(SHUT_DOWN))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self) -> None:
        """Look at the server's health; once it failed, wait until it passes the first check again."""
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            try:
                if not self._available:
                    await self._server.check(self.backbone)
                    self._available = True
                    _log.warning("the vLLM server answers again")
                elif not await self._server.is_healthy():
                    self._lose("it is not healthy")
            except Exception as error:  # nothing may end this task
                _log.warning("%s", error)

    def _lose(self, reason: object) -> None:
        """Fail all requests: a server that comes back may run another model, so it is checked first."""
        if self._available:
            _log.error("the vLLM server is lost: %s", reason)
        self._available = False
        self._fail(self._unfinished(), EngineUnavailable(_UNAVAILABLE))

    @staticmethod
    def _fail(requests: Iterable[EngineRequest], error: Exception) -> None:
        for request in requests:
            request.fail(error)

    def _start_requests(self) -> None:
        """Send what is queued, round-robin over prompts and both kinds of request, while fewer than `max_batch` run."""
        requests: list[EngineRequest] = []
        with self._lock:
            self._queue.drop_done()
            for kind in cycle((ClassifyParams, GenerateParams)):
                if not len(self._queue) or len(self._running) + len(requests) >= self.limits.max_batch:
                    break
                requests += self._queue.take(kind, 1)
            for request in requests:
                self._running[request] = asyncio.create_task(self._answer(request))
        for request in requests:
            request.future.add_done_callback(partial(self._abandon, request))

    def _abandon(self, request: EngineRequest, future: Future[Any]) -> None:
        """Stop exchanging a request that was given up; called from any thread."""
        task = self._running.get(request)
        if task is not None and (future.cancelled() or future.exception() is not None):
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(task.cancel)

    async def _answer(self, request: EngineRequest) -> None:
        start = time.monotonic()
        try:
            if isinstance(request.params, ClassifyParams):
                await self._classify(request)
            else:
                await self._generate(request)
            kind, seconds = type(request.params), (time.monotonic() - start) / len(self._running)
            self._seconds_per_row[kind] += 0.2 * (seconds - self._seconds_per_row[kind])
        except ConnectionLost as error:
            self._lose(error)
        except Exception as error:
            if not isinstance(error, FloatingPointError):
                _log.error("a request failed: %s", error if isinstance(error, EngineUnavailable) else type(error))
            request.fail(error)
        finally:
            self._running.pop(request, None)
            self._wake.set()

    async def _classify(self, request: EngineRequest) -> None:
        prefixes = label_prefixes(request.candidates)
        tokens = sorted({token for ids in request.candidates for token in ids})
        rows = [self._row(request.entry, [*request.ids, *prefix]) for prefix in prefixes]
        log_probs = dict(zip(prefixes, await self._server.logprobs(rows, tokens), strict=True))
        scores = label_scores(request.candidates, log_probs)
        if any(map(math.isnan, scores)):
            raise overflow_error(request)
        request.finish(ClassifyOutput(logprobs=tuple(scores)))

    async def _generate(self, request: EngineRequest) -> None:
        if not request.generation.max_new_tokens:  # an input to echo
            request.finish(GenerateOutput(tokens=(), finish_reason="length"))
            return
        async for token in self._server.stream(self._row(request.entry, request.ids), request.generation):
            request.append_token(token)


def _check_generation(params: GenerateParams) -> None:
    if params.logprobs is not None:
        # v1/sample/sampler.py of vLLM 0.32: where a batch holds a classification too, the most likely tokens of other
        # rows are lost, and a token with the id 0 has no log-probability.
        raise InvalidParameter(
            "logprobs", "is not supported with --engine vllm, which mixes them up with classifications; leave it out"
        )
    if params.sampling.temperature > _MAX_TEMPERATURE:
        raise InvalidParameter(
            "temperature", f"is {params.sampling.temperature:g}, but vLLM takes at most {_MAX_TEMPERATURE:g}; lower it"
        )
