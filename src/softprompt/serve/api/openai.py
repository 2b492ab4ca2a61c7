"""`/v1/completions` and `/v1/chat/completions`, as OpenAI's clients speak them."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from softprompt.serve.api import errors
from softprompt.serve.api.middleware import Record
from softprompt.serve.api.schemas import MAX_ROWS, ChatRequest, CompletionRequest
from softprompt.serve.api.streaming import Answer, record_of, wait_or_cancel
from softprompt.serve.engine import encode
from softprompt.serve.engine.engine import Engine
from softprompt.serve.engine.request import EngineRequest

Input = str | Sequence[int] | Mapping[str, Any]
Kind = Literal["text_completion", "chat.completion"]
_OTHER_TEMPLATE = (
    "chat uses the model's chat template and not the template that prompt {} was trained with; for that one send its "
    "columns as row to /v1/completions, or to /v1/classify"
)


def routes(engine: Engine) -> APIRouter:
    """The two routes."""
    router = APIRouter()

    @router.post("/v1/completions", summary="Go on with a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        inputs: list[Input] = list(body.inputs())
        return await _answer(engine, request, "text_completion", body, inputs, body.max_tokens)

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(body: ChatRequest, request: Request) -> Response:
        served = engine.get(body.model)
        messages = [message.plain() for message in body.messages]
        ids = await asyncio.to_thread(encode.chat, engine.backbone, messages)
        most = body.max_completion_tokens or body.max_tokens
        note = "" if served.task is None else _OTHER_TEMPLATE.format(served.name)
        return await _answer(engine, request, "chat.completion", body, [ids], most, note)

    return router


@final
@dataclass(frozen=True)
class _Job:
    """A request that is being answered."""

    kind: Kind
    model: str
    answers: list[Answer]
    record: Record
    id: str
    created: int

    def usage(self) -> dict[str, int]:
        read, written = self.record.read, self.record.written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """A whole answer."""
        shared = {"index": index, "finish_reason": finish, "logprobs": None}
        if self.kind == "text_completion":
            return {**shared, "text": text}
        return {**shared, "message": {"role": "assistant", "content": text, "refusal": None}}

    def piece(self, index: int, text: str, finish: str | None, *, first: bool) -> dict[str, Any]:
        """A part of an answer."""
        shared = {"index": index, "finish_reason": finish, "logprobs": None}
        if self.kind == "text_completion":
            return {**shared, "text": text}
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return {**shared, "delta": delta}


async def _answer(
    engine: Engine,
    request: Request,
    kind: Kind,
    body: CompletionRequest | ChatRequest,
    inputs: Sequence[Input],
    most: int | None,
    note: str = "",
) -> Response:
    record = record_of(request)
    record.prompt = engine.get(body.model).name
    times = body.n or 1
    if len(inputs) * times > MAX_ROWS:
        raise ValueError(f"{len(inputs)} inputs with {times} answers each are too many; ask for at most {MAX_ROWS}")
    seed = secrets.randbits(31) if body.seed is None else body.seed
    job = _Job(
        kind,
        body.model,
        [Answer(engine.backbone.tokenizer, body.stops()) for _ in range(len(inputs) * times)],
        record,
        f"{'cmpl' if kind == 'text_completion' else 'chatcmpl'}-{secrets.token_hex(12)}",
        int(time.time()),
    )
    asks = [_asking(engine, body, one, most, seed + place) for one in inputs for place in range(times)]
    record.rows, record.texts, record.answers_each = len(asks), list(inputs), times
    await asyncio.to_thread(_begin, job, asks)
    headers = {"Softprompt-Note": note} if note else {}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_stream(job, usage), media_type="text/event-stream", headers=headers)
    texts = await wait_or_cancel(request, engine, asyncio.gather(*(answer.whole() for answer in job.answers)))
    choices = [
        job.choice(index, text, answer.finish)
        for index, (text, answer) in enumerate(zip(texts, job.answers, strict=True))
    ]
    told = {"note": note} if note else {}
    return JSONResponse({**job.envelope(choices, chunk=False), "usage": job.usage(), **told}, headers=headers)


def _asking(
    engine: Engine, body: CompletionRequest | ChatRequest, given: Input, most: int | None, seed: int
) -> Callable[[Callable[[int], None]], EngineRequest]:
    def ask(on_token: Callable[[int], None]) -> EngineRequest:
        return engine.generate(body.model, given, max_new_tokens=most, sampling=body.sampling(seed), on_token=on_token)

    return ask


def _begin(job: _Job, asks: Sequence[Callable[[Callable[[int], None]], EngineRequest]]) -> None:
    for answer, ask in zip(job.answers, asks, strict=True):
        job.record.requests.append(answer.begin(ask))


async def _stream(job: _Job, usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
        for index, answer in enumerate(job.answers):
            first = True
            async for text in answer.pieces():
                yield _event(job.envelope([job.piece(index, text, None, first=first)], chunk=True))
                first = False
            yield _event(job.envelope([job.piece(index, "", answer.finish, first=first)], chunk=True))
        if usage:
            yield _event({**job.envelope([], chunk=True), "usage": job.usage()})
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status has been sent; the error is all that is left to send
        yield _event(errors.described(error)[1])
        if not isinstance(error, errors.EXPECTED):
            raise


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"
