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

from softprompt.models import model_class
from softprompt.serve.api import errors
from softprompt.serve.api.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, concatenate
from softprompt.serve.api.middleware import RequestRecord
from softprompt.serve.api.schemas import MAX_ROWS, ChatRequest, CompletionRequest
from softprompt.serve.api.streaming import TextStream, record_of, wait_or_cancel
from softprompt.serve.engine import encode
from softprompt.serve.engine.base import BaseEngine
from softprompt.serve.engine.request import EngineRequest, InvalidParameter

Input = str | Sequence[int] | Mapping[str, Any]
Kind = Literal["text_completion", "chat.completion"]
_OTHER_TEMPLATE = (
    "chat uses the model's chat template and not the template that prompt {} was trained with; to use that one, send "
    "its columns as row to /v1/completions, or to /v1/classify"
)


def openai_routes(engine: BaseEngine) -> APIRouter:
    """Completions and chat completions."""
    router, names = APIRouter(), TokenNames(engine.backbone.tokenizer)

    @router.post("/v1/completions", summary="Continue a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        inputs: list[Input] = list(body.inputs())
        return await _complete(engine, names, request, "text_completion", body, inputs, body.max_tokens)

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(body: ChatRequest, request: Request) -> Response:
        entry = engine.get(body.model)
        messages = [message.to_template() for message in body.messages]
        ids = await asyncio.to_thread(encode.chat, engine.backbone, messages, engine.limits.max_input_tokens)
        max_tokens = body.max_completion_tokens or body.max_tokens
        note = "" if entry.task is None or entry.task.messages else _OTHER_TEMPLATE.format(entry.name)
        return await _complete(engine, names, request, "chat.completion", body, [ids], max_tokens, note)

    return router


@final
class _Choice:
    """One answer: its text as it grows, after the input if that is echoed, and the log-probabilities."""

    def __init__(self, index: int, stream: TextStream, first: "_Choice | None", source: Input | None) -> None:
        """`first` is the same input's first answer, whose request scores the input; `source` is what to echo."""
        self.index = index
        self.stream = stream
        self._first = first or self
        self._source = source

    async def pieces(self, names: TokenNames) -> AsyncIterator[str]:
        """The text, piece by piece; never ends without one if there is an input to echo."""
        echoed = self._echoed_text(names)
        async for piece in self.stream.pieces():
            yield echoed + piece
            echoed = ""
        if echoed:
            yield echoed

    async def text(self, names: TokenNames) -> str:
        """The full text."""
        return "".join([piece async for piece in self.pieces(names)])

    def logprobs(self, kind: Kind, names: TokenNames) -> "_Logprobs":
        """The formatter of its log-probabilities."""
        return _Logprobs(self, kind, names, len(self._echoed_text(names)))

    @property
    def echoes(self) -> bool:
        """Whether the input comes before the answer."""
        return self._source is not None

    @property
    def scored_request(self) -> EngineRequest:
        """The request that scored the input."""
        assert self._first.stream.request is not None
        return self._first.stream.request

    def _echoed_text(self, names: TokenNames) -> str:
        if self._source is None or isinstance(self._source, str):
            return self._source or ""
        return names.text(self.scored_request.ids)


@final
class _Logprobs:
    """The `logprobs` of one choice, all at once or chunk by chunk."""

    def __init__(self, choice: _Choice, kind: Kind, names: TokenNames, echoed: int) -> None:
        self._choice, self._kind, self._names = choice, kind, names
        self._input = CompletionLogprobs(names) if choice.echoes else None
        self._answer = CompletionLogprobs(names, echoed, continues_text=choice.stream.continues_text)

    def take(self) -> dict[str, Any]:
        """Those of the text since the last call, the input's first."""
        entries = self._choice.stream.take_logprobs()
        if self._kind == "chat.completion":
            return chat_logprobs(self._names, entries)
        parts = [self._answer.tokens(entries)]
        if self._input is not None:
            request = self._choice.scored_request
            parts = [self._input.first_token(request.ids[0]), self._input.tokens(request.input_logprobs), *parts]
            self._input = None
        return concatenate(parts)


@final
@dataclass(frozen=True)
class _Completion:
    """A response in OpenAI's format."""

    id: str
    created: int
    kind: Kind
    model: str
    choices: list[_Choice]
    names: TokenNames
    with_logprobs: bool
    record: RequestRecord

    def usage(self) -> dict[str, int]:
        inputs, outputs = self.record.input_tokens, self.record.output_tokens
        return {"prompt_tokens": inputs, "completion_tokens": outputs, "total_tokens": inputs + outputs}

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    async def content(self) -> dict[str, Any]:
        """The full response."""
        # All of them before any is formatted: an input is scored in the request of its first answer.
        texts = await asyncio.gather(*(choice.text(self.names) for choice in self.choices))
        choices = [self._full_choice(choice, text) for choice, text in zip(self.choices, texts, strict=True)]
        return {**self.envelope(choices, chunk=False), "usage": self.usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events, the choices one after another."""
        usage = {"usage": None} if include_usage else {}
        try:
            for choice in self.choices:
                async for chunk in self._chunks(choice):
                    yield _event({**self.envelope([chunk], chunk=True), **usage})
            if include_usage:
                yield _event({**self.envelope([], chunk=True), "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is sent already, so the error becomes an event
            yield _event(errors.explain(error)[1])
            if not isinstance(error, errors.EXPECTED):
                raise

    def _full_choice(self, choice: _Choice, text: str) -> dict[str, Any]:
        logprobs = choice.logprobs(self.kind, self.names).take() if self.with_logprobs else None
        fields = {"index": choice.index, "finish_reason": choice.stream.finish_reason, "logprobs": logprobs}
        if self.kind == "text_completion":
            return {**fields, "text": text}
        return {**fields, "message": {"role": "assistant", "content": text, "refusal": None}}

    async def _chunks(self, choice: _Choice) -> AsyncIterator[dict[str, Any]]:
        logprobs = choice.logprobs(self.kind, self.names) if self.with_logprobs else None
        first = True

        def chunk(text: str, finish_reason: str | None) -> dict[str, Any]:
            taken = {} if logprobs is None else logprobs.take()
            reported = taken if taken.get("tokens") or taken.get("content") else None
            fields = {"index": choice.index, "finish_reason": finish_reason, "logprobs": reported}
            if self.kind == "text_completion":
                return {**fields, "text": text}
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            return {**fields, "delta": delta}

        async for text in choice.pieces(self.names):
            yield chunk(text, None)
            first = False
        yield chunk("", choice.stream.finish_reason)


async def _complete(
    engine: BaseEngine,
    names: TokenNames,
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
        raise InvalidParameter("n", f"is {n} for {len(inputs)} inputs; ask for at most {MAX_ROWS} answers in all")
    echo = isinstance(body, CompletionRequest) and bool(body.echo)
    continues = echo or (kind == "text_completion" and model_class(engine.backbone).decoder_only)
    streams = [
        TextStream(engine.backbone.tokenizer, body.stops(), continues_input=continues) for _ in range(len(inputs) * n)
    ]
    record.rows, record.texts, record.answers_per_input = len(streams), list(inputs), n
    num_top = body.num_top_logprobs
    seeds = [secrets.randbits(31) if body.seed is None else body.seed for _ in inputs]
    choices: list[_Choice] = []
    for index, stream in enumerate(streams):
        first = choices[index - index % n] if index % n else None
        choices.append(_Choice(index, stream, first, inputs[index // n] if echo else None))

    def submit() -> None:
        for index, stream in enumerate(streams):
            engine_request = engine.generate(
                body.model,
                inputs[index // n],
                max_new_tokens=max_tokens,
                sampling=body.sampling(seeds[index // n] + index % n),
                arrived=record.arrived,
                on_token=stream.put,
                logprobs=num_top,
                score_input=echo and num_top is not None and not index % n,
                logit_bias=body.logit_bias,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
            )
            stream.attach(engine_request)
            record.requests.append(engine_request)

    await asyncio.to_thread(submit)  # tokenizing takes time
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    completion = _Completion(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        kind=kind,
        model=body.model,
        choices=choices,
        names=names,
        with_logprobs=num_top is not None,
        record=record,
    )
    headers = {"Softprompt-Note": note} if note else {}
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = completion.events(include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    content = await wait_or_cancel(request, engine, completion.content())
    return JSONResponse({**content, "note": note} if note else content, headers=headers)


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"
