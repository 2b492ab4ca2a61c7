"""The bodies that clients send, as the OpenAPI page shows them; responses are plain objects in OpenAI's format."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softprompt.models import Sampling

MAX_ROWS = 128
"""Rows per request."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""OpenAI's fields that are accepted only with a value that asks for nothing."""
_NO_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""OpenAI's fields that do not affect the answer; accepted and ignored."""

_MAX_KEYS = 256
"""Keys of an object: each wrong key is an error of its own, far larger than what was sent."""

_FailFast = Field(fail_fast=True)
"""Validation of a list ends at its first wrong item."""
Cell = str | int | float | bool
Name = Annotated[str, Field(min_length=1, max_length=128, description="The prompt's name.")]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """Send the token counts in a last chunk."""
    include_obfuscation: bool = False
    """Accepted, and without effect: the sizes of chunks are not disguised."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: Name

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("it holds half of a surrogate pair, or is nested too deeply; send valid text") from None
        _check_keys(values)
        for name, neutral in _NEUTRAL.items():
            if name in values and values[name] is not None and values[name] not in neutral:
                raise ValueError(f"{name} is not supported; leave it out")
        return {name: value for name, value in values.items() if name not in _NEUTRAL and name not in _NO_EFFECT}


class _GenerationRequest(_Request):
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """0 (the default): greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    """Seed of the sampling; none: another one for each request."""
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    """Answers per input."""
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    """Texts that end an answer and are not part of it."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, seed: int) -> Sampling:
        """The sampling parameters, with a seed."""
        return Sampling(
            temperature=float(self.temperature or 0.0), top_k=self.top_k, top_p=float(self.top_p or 1.0), seed=seed
        )

    def stops(self) -> list[str]:
        """The stop texts, without empty ones, which would end an answer before it begins."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]


class CompletionRequest(_GenerationRequest):
    """Texts or token ids to continue, or a row of the prompt's template."""

    prompt: (
        str
        | Annotated[list[str], _FailFast]
        | Annotated[list[int], _FailFast]
        | Annotated[list[Annotated[list[int], _FailFast]], _FailFast]
        | None
    ) = None
    row: dict[str, Cell] | None = None
    """Instead of `prompt`: the columns of the template that the prompt was trained with."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    def inputs(self) -> list[str | list[int] | dict[str, Cell]]:
        """The inputs.

        Raises:
            ValueError: there are none, or too many.
        """
        if (self.prompt is None) == (self.row is None):
            raise ValueError("a completion takes either prompt or row; send one of them")
        if self.row is not None:
            return [self.row]
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        assert prompt is not None
        inputs = [prompt] if prompt and isinstance(prompt[0], int) else prompt
        return _check_count([text if isinstance(text, str) else list(text) for text in inputs])  # type: ignore[arg-type]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _FailFast]

    def to_template(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_GenerationRequest):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class ClassifyRequest(_Request):
    """Rows to classify."""

    input: str | dict[str, Cell] | Annotated[list[str | dict[str, Cell]], _FailFast]
    """A text or the template's columns, or a list of either."""
    labels: Annotated[list[str], Field(min_length=2, max_length=64, fail_fast=True)] | None = None
    """The labels to choose among, for a prompt without labels of its own."""

    def rows(self) -> list[str | dict[str, Cell]]:
        """The rows; raises `ValueError` if there are none, or too many."""
        return _check_count(self.input if isinstance(self.input, list) else [self.input])


def _check_count(rows: list[Any]) -> list[Any]:
    if not 1 <= len(rows) <= MAX_ROWS:
        raise ValueError(f"the request has {len(rows)} inputs; send from 1 to {MAX_ROWS}")
    return rows


def _check_keys(values: Any) -> None:
    """Reject objects with more keys than any request has, before pydantic looks at each key."""
    remaining = [values]
    while remaining:
        value = remaining.pop()
        if isinstance(value, dict):
            if len(value) > _MAX_KEYS:
                raise ValueError(f"an object in the body has {len(value)} keys; send at most {_MAX_KEYS}")
            value = list(value.values())
        remaining += [inner for inner in value if isinstance(inner, dict | list)]
