"""What clients send, field by field, as the OpenAPI page shows it; answers are plain objects in OpenAI's shape."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from softprompt.models import Sampling

MAX_ROWS = 128
"""Rows of one request."""
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
"""OpenAI's fields that are taken only where they ask for nothing."""
_NO_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""OpenAI's fields that say nothing about the answer."""

_MAX_KEYS = 256
"""Names in an object: each that is wrong is an error of its own, a thousand times what it took to send."""

_First = Field(fail_fast=True)
"""Of a list: the first wrong one ends it."""
Cell = str | int | float | bool
Name = Annotated[str, Field(min_length=1, max_length=128, description="The prompt's name.")]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """Send the number of tokens before the end."""
    include_obfuscation: bool = False
    """Taken, and without effect: the sizes of pieces are not disguised."""


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
            raise ValueError("it holds half of a surrogate pair, or is nested too deeply; send whole text") from None
        _refuse_crowded(values)
        for name, neutral in _NEUTRAL.items():
            if name in values and values[name] is not None and values[name] not in neutral:
                raise ValueError(f"{name} is not supported; leave it out")
        return {name: value for name, value in values.items() if name not in _NEUTRAL and name not in _NO_EFFECT}


class _Writing(_Request):
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """0, and unless it is given: the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    """Of the draws; none: another one each time."""
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    """Answers to each input."""
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    """Texts that end an answer."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, seed: int) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            temperature=float(self.temperature or 0.0), top_k=self.top_k, top_p=float(self.top_p or 1.0), seed=seed
        )

    def stops(self) -> list[str]:
        """Texts that end an answer; empty ones would end it before it begins."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]


class CompletionRequest(_Writing):
    """A text to go on with, several, or their tokens; or a row of the prompt's template."""

    prompt: (
        str
        | Annotated[list[str], _First]
        | Annotated[list[int], _First]
        | Annotated[list[Annotated[list[int], _First]], _First]
        | None
    ) = None
    row: dict[str, Cell] | None = None
    """The columns of the template that the prompt was trained with, in place of `prompt`."""
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    def inputs(self) -> list[str | list[int] | dict[str, Cell]]:
        """Each input.

        Raises:
            ValueError: none, or too many.
        """
        if (self.prompt is None) == (self.row is None):
            raise ValueError("a completion takes either prompt or row; send one of them")
        if self.row is not None:
            return [self.row]
        given = self.prompt
        if isinstance(given, str):
            return [given]
        assert given is not None
        whole = [given] if given and isinstance(given[0], int) else given
        return _bounded([one if isinstance(one, str) else list(one) for one in whole])  # type: ignore[arg-type]


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _First]

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Writing):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class ClassifyRequest(_Request):
    """Rows to choose a label for."""

    input: str | dict[str, Cell] | Annotated[list[str | dict[str, Cell]], _First]
    """A text or the template's columns; or a list of such."""
    labels: Annotated[list[str], Field(min_length=2, max_length=64, fail_fast=True)] | None = None
    """The words to choose among, for a prompt that has none of its own."""

    def rows(self) -> list[str | dict[str, Cell]]:
        """Each row; raises `ValueError` for none or too many."""
        return _bounded(self.input if isinstance(self.input, list) else [self.input])


def _bounded(rows: list[Any]) -> list[Any]:
    if not 1 <= len(rows) <= MAX_ROWS:
        raise ValueError(f"the request has {len(rows)} inputs; send from 1 to {MAX_ROWS}")
    return rows


def _refuse_crowded(values: Any) -> None:
    """Refuse objects of more names than any request has, before each of them is looked at."""
    left = [values]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if len(one) > _MAX_KEYS:
                raise ValueError(f"an object in it has {len(one)} names; send at most {_MAX_KEYS}")
            one = list(one.values())
        left += [inner for inner in one if isinstance(inner, dict | list)]
