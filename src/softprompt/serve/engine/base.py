"""What every engine does: named prompts, requests turned into tokens, and the checks of both."""

import difflib
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from softprompt.backbones import Backbone
from softprompt.models import Sampling
from softprompt.prompts import SoftPrompt
from softprompt.serve.engine import encode
from softprompt.serve.engine.limits import Limits
from softprompt.serve.engine.request import EngineRequest, GenerateParams, InvalidParameter, PromptNotFound
from softprompt.serve.engine.threads import call_in_own_thread
from softprompt.serve.prompts.entry import BASE, PromptEntry, display_name, from_folder, from_prompt

EngineT = TypeVar("EngineT", bound="BaseEngine")


@final
@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """A snapshot of an engine."""

    ready: bool
    """Whether it accepts requests."""
    prompts: int
    """Prompts that can be named, without the base model."""
    queued: int
    """Rows that wait."""
    queued_by_prompt: Mapping[str, int]
    """The same, by the prompt's name."""
    generating: int
    """Rows whose text is being generated."""
    max_batch: int
    """Rows per batch at present, or at the same time."""


class BaseEngine(ABC):
    """Serves prompts over one backbone; any thread may send requests. A subclass decides where they run.

    Args:
        backbone: for tokens and checks.
        base: the model without a prompt, if it can answer.
        stop: the token ids that end a text.
        limits: bounds on batches, the queue and requests.
    """

    def __init__(self, backbone: Backbone, base: PromptEntry | None, stop: Sequence[int], limits: Limits) -> None:
        self.backbone, self.limits = backbone, limits
        self._base, self._stop = base, tuple(stop)
        self._entries: dict[str, PromptEntry] = {}
        self._entries_lock = threading.Lock()

    def __enter__(self: EngineT) -> EngineT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def prompts(self) -> list[PromptEntry]:
        """The prompts, sorted by name."""
        entries = self._entries.copy()  # another thread may remove one meanwhile
        return [entries[name] for name in sorted(entries)]

    @property
    def models(self) -> list[PromptEntry]:
        """What requests can name: the prompts and, if it can answer, the model without one."""
        return self.prompts if self._base is None else [*self.prompts, self._base]

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the engine's thread runs and is not stuck; where not, the process must be restarted."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether new requests are refused, for good."""

    @abstractmethod
    def status(self) -> EngineStatus:
        """A snapshot of the queue and of running generations."""

    @abstractmethod
    def close(self, grace: float = 30.0) -> None:
        """Refuse new requests and finish the others; those left after `grace` seconds fail with `EngineClosed`."""

    @abstractmethod
    def _complete(self, entry: PromptEntry) -> PromptEntry:
        """The prompt with all that the engine computes for it; raises `ValueError` where it cannot serve it."""

    @abstractmethod
    def _submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue all of the requests, or none; raises what `submit` raises."""

    def get(self, name: str) -> PromptEntry:
        """The prompt of that name; `base` is the model without one.

        Raises:
            PromptNotFound: no prompt has that name.
        """
        entry = self._entries.get(name)
        if entry is None and name == BASE:
            if self._base is None:
                raise PromptNotFound(
                    f"{display_name(self.backbone)} answers through a head that is trained with a prompt, and has no "
                    f"{BASE!r} to ask; name a prompt"
                )
            entry = self._base
        if entry is None:
            similar = difflib.get_close_matches(name, [*self._entries.copy(), BASE], n=3)
            names = " or ".join(map(repr, similar))
            raise PromptNotFound(
                f"there is no prompt {name!r}; " + (f"did you mean {names}?" if similar else "see the list of prompts")
            )
        return entry

    def add(self, name: str, source: Path | str | SoftPrompt, *, replace: bool = False) -> PromptEntry:
        """Serve a run, a PEFT prompt-tuning folder or a prompt; requests for other prompts continue meanwhile.

        Args:
            replace: replace a prompt of that name; queued requests are still answered with the old one.

        Raises:
            FileExistsError: the name is taken.
            ValueError, FileNotFoundError: the prompt cannot be served; nothing has changed.
            TimeoutError: the engine is stuck; nothing has changed.
        """
        entry = self.make_entry(name, source, replace=replace)
        with self._entries_lock:
            self._check_free(name, replace)
            self.register(entry)
        return entry

    def make_entry(self, name: str, source: Path | str | SoftPrompt, *, replace: bool = False) -> PromptEntry:
        """Compute what `add` would serve, without serving it; raises what `add` raises."""
        self._check_free(name, replace)
        return self._complete(call_in_own_thread(lambda: self._read(name, source)))

    def register(self, entry: PromptEntry) -> None:
        """Serve what `make_entry` returned, replacing a prompt of the same name."""
        self._entries[entry.name] = entry

    def remove(self, name: str) -> None:
        """Stop serving a prompt; queued requests are still answered.

        Raises:
            PromptNotFound: no prompt has that name.
        """
        self.check_not_base(name)
        self.get(name)
        self._entries.pop(name, None)

    def check_not_base(self, name: str) -> None:
        """Check that a change is not to `base`.

        Raises:
            ValueError: it is.
        """
        if name == BASE:
            raise ValueError(f"{BASE!r} is the model without a prompt and cannot be changed; choose another name")

    def classify(
        self,
        name: str,
        rows: Sequence[str | Mapping[str, object]],
        labels: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
        arrived: float | None = None,
    ) -> list[EngineRequest]:
        """Score the prompt's labels, or the given ones, for each row.

        Args:
            rows: the template's columns; a text alone if the template has one column or there is no template. An image
                is the bytes of its file, or those in base64; never a path.
            labels: for a prompt without a task.
            timeout: seconds; None: the engine's.
            arrived: when the request came, from which its time counts, as `time.monotonic`; None: now.

        Raises:
            PromptNotFound: no prompt has that name.
            ValueError: rows or labels that cannot be answered.
            QueueFull, EngineClosed: the engine accepts no requests now, or ever again.
        """
        entry = self.get(name)
        limits: dict[str, Any] = {"timeout": self._timeout(timeout), "arrived": arrived or time.monotonic()}
        if entry.task is not None and entry.task.image:
            head_params = encode.head_params(entry, labels)
            images = encode.images(self.backbone, entry, rows)
            requests = [EngineRequest(entry, (), head_params, pixels=pixels, **limits) for pixels in images]
        else:
            inputs = encode.classification(self.backbone, entry, rows, labels, self.limits.max_input_tokens)
            requests = [EngineRequest(entry, ids, params, **limits) for ids, params in inputs]
        self.submit(requests)
        return requests

    def generate(
        self,
        name: str,
        text: str | Mapping[str, object] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        timeout: float | None = None,
        arrived: float | None = None,
        on_token: Callable[[int], None] | None = None,
        logprobs: int | None = None,
        score_input: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> EngineRequest:
        """Continue a text, a row of the prompt's template, or token ids.

        Log-probabilities are the model's own, of natural logarithm: before temperature, bias and penalties.

        Args:
            max_new_tokens: None: the prompt's, or fewer where the engine's limit is lower; 0: none, for an input
                that is only scored.
            timeout, arrived: as of `classify`.
            on_token: called in the engine's thread with each token; it must not block.
            logprobs: set the request's `logprobs`, each with this many of the most likely tokens.
            score_input: set its `input_logprobs` too; needs `logprobs`.
            logit_bias: added to the logits, by token id.
            presence_penalty, frequency_penalty: as in `LogitAdjuster`.

        Raises:
            PromptNotFound: no prompt has that name.
            ValueError: an input that cannot be continued, or that leaves no room for the answer.
            QueueFull, EngineClosed: the engine accepts no requests now, or ever again.
        """
        entry, arrived = self.get(name), arrived or time.monotonic()
        most = self.limits.max_new_tokens
        length = min(entry.max_new_tokens, most) if max_new_tokens is None else max_new_tokens
        if not 0 <= length <= most:
            raise InvalidParameter("max_tokens", f"is {length}; it must be from 0 to {most}")
        ids = encode.completion(self.backbone, entry, text, length, self.limits.max_input_tokens)
        params = GenerateParams(
            max_new_tokens=length,
            sampling=sampling or Sampling(),
            stop=self._stop,
            logprobs=logprobs,
            score_input=score_input,
            logit_bias=logit_bias or {},
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )
        encode.check_generation(self.backbone, params)
        request = EngineRequest(entry, ids, params, timeout=self._timeout(timeout), arrived=arrived, on_token=on_token)
        self.submit([request])
        return request

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Queue all of the requests, or none.

        Raises:
            ValueError: a row has a token that the backbone has no embedding for.
            QueueFull, EngineClosed: the engine accepts no requests now, or ever again.
        """
        for number, request in enumerate(requests, start=1):
            encode.check_tokens(self.backbone, request, f"row {number}" if len(requests) > 1 else "the text")
        self._submit(requests)

    def _read(self, name: str, source: Path | str | SoftPrompt) -> PromptEntry:
        if isinstance(source, SoftPrompt):
            return from_prompt(name, source, self.backbone)
        return from_folder(name, Path(source).expanduser(), self.backbone)

    def _overflow(self, entry: PromptEntry) -> ValueError:
        """The error of a prompt whose finite values overflow in the backbone, for every row."""
        return ValueError(
            f"prompt {entry.name!r} overflows in {display_name(self.backbone)}: its values are too large; train it "
            "again"
        )

    def _check_free(self, name: str, replace: bool) -> None:
        self.check_not_base(name)
        if name in self._entries and not replace:
            raise FileExistsError(f"the prompt name {name!r} is taken; choose another, or replace it")
        if name not in self._entries and len(self._entries) >= self.limits.max_prompts:
            raise ValueError(f"{len(self._entries)} prompts are served, the most allowed; remove one first")

    def _timeout(self, timeout: float | None) -> float:
        return self.limits.timeout if timeout is None else min(timeout, self.limits.timeout)
