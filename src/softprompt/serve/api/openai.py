"""`/v1/completions` and `/v1/chat/completions`, as OpenAI's clients expect them."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from softprompt.serve.api import errors
from softprompt.serve.api.middleware import RequestRecord
from softprompt.serve.api.schemas import MAX_ROWS, ChatRequest, CompletionRequest
from softprompt.serve.api.streaming import TextStream, record_of, wait_or_cancel
from softprompt.serve.engine import encode
from softprompt.serve.engine.engine import Engine

Input = str | Sequence[int] | Mapping[str, Any]
Kind = Literal["text_completion", "chat.completion"]
_OTHER_TEMPLATE = (
    "chat uses the model's chat template and not the template that prompt {} was trained with; to use that one, send "
    "its columns as row to /v1/completions, or to /v1/classify"
)


def openai_routes(engine: Engine) -> APIRouter:
    """Completions and chat completions."""
    router = APIRouter()

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        inputs: list[Input] = list(body.inputs())
        return await _complete(engine, request, "text_completion", body, inputs, body.max_tokens)

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(body: ChatRequest, request: Request) -> Response:
        entry = engine.get(body.model)
        messages = [message.to_template() for message in body.messages]
        ids = await asyncio.to_thread(encode.chat, engine.backbone, messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        note = "" if entry.task is None else _OTHER_TEMPLATE.format(entry.name)
        return await _complete(engine, request, "chat.completion", body, [ids], max_tokens, note)

    return router


@final
@dataclass(frozen=True)
class _Completion:
    """A response in OpenAI's format, one choice per stream."""

    id: str
    created: int
    kind: Kind
    model: str
    streams: list[TextStream]
    record: RequestRecord

    def usage(self) -> dict[str, int]:
        inputs, outputs = self.record.input_tokens, self.record.output_tokens
        return {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def full_choice(self, index: int, text: str, finish_reason: str) -> dict[str, Any]:
        fields = {"index": index, "finish_reason": finish_reason, "logprobs": None}
        if self.kind == "text_completion":
            return {**fields, "text": text}
        return {**fields, "message": {"role": "assistant", "content": text, "refusal": None}}

    def chunk_choice(self, index: int, text: str, finish_reason: str | None, *, first: bool) -> dict[str, Any]:
        fields = {"index": index, "finish_reason": finish_reason, "logprobs": None}
        if self.kind == "text_completion":
            return {**fields, "text": text}
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        return {**fields, "delta": delta}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, the streams one after another."""
        try:
            for index, stream in enumerate(self.streams):
                first = True
                async for text in stream.pieces():
                    yield _event(self.envelope([self.chunk_choice(index, text, None, first=first)], chunk=True))
                    first = False
                last = self.chunk_choice(index, "", stream.finish_reason, first=first)
                yield _event(self.envelope([last], chunk=True))
            if include_usage:
                yield _event({**self.envelope([], chunk=True), "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already, so the error becomes an event
            yield _event(errors.explain(error)[1])
            if not isinstance(error, errors.EXPECTED):
                raise


async def _complete(
    engine: Engine,
    request: Request,
    kind: Kind,
    body: CompletionRequest | ChatRequest,
    inputs: Sequence[Input],
    max_tokens: int | None,
    note: str = "",
) -> Response:
    record, n = record_of(request), body.n or 1
    record.prompt = engine.get(body.model).name
    if len(inputs) * n > MAX_ROWS:
        raise ValueError(f"{len(inputs)} inputs with {n} answers each are too many; ask for at most {MAX_ROWS}")
    streams = [TextStream(engine.backbone.tokenizer, body.stops()) for _ in range(len(inputs) * n)]
    record.rows, record.texts, record.answers_per_input = len(streams), list(inputs), n
    seed = secrets.randbits(31) if body.seed is None else body.seed

    def submit() -> None:
        for index, stream in enumerate(streams):
            engine_request = engine.generate(
                body.model,
                inputs[index // n],
                max_new_tokens=max_tokens,
                sampling=body.sampling(seed + index % n),
                on_token=stream.put,
            )
            stream.attach(engine_request)
            record.requests.append(engine_request)

    await asyncio.to_thread(submit)  # tokenizing takes time
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    completion = _Completion(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), kind, body.model, streams, record)
    headers = {"Softprompt-Note": note} if note else {}
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = completion.events(include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    texts = await wait_or_cancel(request, engine, asyncio.gather(*(stream.text() for stream in streams)))
    choices = [
        completion.full_choice(index, text, stream.finish_reason)
        for index, (text, stream) in enumerate(zip(texts, streams, strict=True))
    ]
    content = {**completion.envelope(choices, chunk=False), "usage": completion.usage()}
    return JSONResponse({**content, "note": note} if note else content, headers=headers)


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"
