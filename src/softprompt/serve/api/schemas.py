"""The bodies that clients send, as the OpenAPI page shows them; responses are plain objects in OpenAI's format."""

import json
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from softprompt.models import Sampling

MAX_ROWS = 128
"""Rows per request."""
MAX_TOP_LOGPROBS = 20
"""Most likely tokens that a request can ask for."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's fields that are accepted only with a value that asks for nothing, or null."""
_NO_EFFECT = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""OpenAI's fields that do not affect the answer; accepted and ignored."""

_OTHER_PARTS = ("image_url", "input_audio", "file", "refusal")
"""OpenAI's content parts that are not text."""
_NEUTRAL_OF_MESSAGE = ("annotations", "audio", "function_call", "refusal", "tool_calls")
"""Fields of the answers that clients send back, accepted without a value."""
_MAX_KEYS = 1024
"""Keys of an object: each wrong key is an error of its own, far larger than what was sent."""

_FailFast = Field(fail_fast=True)
"""Validation of a list ends at its first wrong item."""
_Inputs = Field(max_length=MAX_ROWS, fail_fast=True)
Cell = str | int | float | bool
Name = Annotated[str, Field(min_length=1, max_length=128, description="The prompt's name.")]


def field_error(name: str, problem: str) -> PydanticCustomError:
    """The error of a field that is refused; the response has its name as `param`."""
    return PydanticCustomError("unsupported_parameter", "{field} {problem}", {"field": name, "problem": problem})


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
        for name in values:
            if name in _NEUTRAL and name not in cls.model_fields:
                _check_neutral(name, values[name], _NEUTRAL[name])
        return {
            name: value
            for name, value in values.items()
            if name in cls.model_fields or (name not in _NEUTRAL and name not in _NO_EFFECT)
        }


class _GenerationRequest(_Request):
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """0 (the default): greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    """Seed of the sampling; None: another one for each request."""
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    """Answers per input."""
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    """Texts that end an answer and are not part of it."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Added to the logits, by token id."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logit of each token that the answer holds already."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted once per earlier occurrence of the token."""

    @model_validator(mode="after")
    def _check_stream_options(self) -> "_GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise field_error("stream_options", "has no effect without stream; set stream, or leave it out")
        return self

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """Most likely tokens to report with each token's log-probability; None: report nothing."""

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
        | Annotated[list[str], _Inputs]
        | Annotated[list[int], _FailFast]
        | Annotated[list[Annotated[list[int], _FailFast]], _Inputs]
        | None
    ) = None
    row: dict[str, Cell] | None = None
    """Instead of `prompt`: the columns of the template that the prompt was trained with."""
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """0, with `echo`: return only the input."""
    echo: bool | None = None
    """Put the input before the answer."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Report each token's log-probability, and this many of the most likely tokens."""
    best_of: int | None = None
    """Accepted if it equals `n`."""

    @field_validator("logprobs", mode="before")
    @classmethod
    def _without_flag(cls, value: Any) -> Any:
        if value is True:
            raise ValueError("true is a chat's value; send the number of most likely tokens to report")
        return None if value is False else value

    @model_validator(mode="after")
    def _check_fields(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise field_error("best_of", "is not supported beyond n; leave it out")
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "is 0, which returns nothing without echo; ask for at least 1")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """Most likely tokens to report with each token's log-probability; None: report nothing."""
        return self.logprobs

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

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if kind in _OTHER_PARTS:
            raise field_error("type", f"{kind} is not supported; send parts of type text")
        return values


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], _FailFast]
    name: str | None = None
    """Accepted, and without effect."""

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in _NEUTRAL_OF_MESSAGE:
            _check_neutral(name, values.get(name), ([],))
        return {name: value for name, value in values.items() if name not in _NEUTRAL_OF_MESSAGE}

    def to_template(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_GenerationRequest):
    """A conversation to answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    """Report each token's log-probability."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Most likely tokens to report with it."""

    @model_validator(mode="after")
    def _check_fields(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "has no effect without logprobs; set logprobs to true, or leave it out")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise field_error("max_tokens", "differs from max_completion_tokens; send one of them")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """Most likely tokens to report with each token's log-probability; None: report nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ClassifyRequest(_Request):
    """Rows to classify."""

    input: str | dict[str, Cell] | Annotated[list[str | dict[str, Cell]], _Inputs]
    """A text or the template's columns, or a list of either."""
    labels: Annotated[list[str], Field(min_length=2, max_length=64, fail_fast=True)] | None = None
    """The labels to choose among, for a prompt without labels of its own."""

    def rows(self) -> list[str | dict[str, Cell]]:
        """The rows; raises `ValueError` if there are none, or too many."""
        return _check_count(self.input if isinstance(self.input, list) else [self.input])


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    # 0 == False, and tuples compare with ==.
    if value is not None and not any(type(value) is type(other) and value == other for other in neutral):
        raise field_error(name, "is not supported; leave it out")


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
