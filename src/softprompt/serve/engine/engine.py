"""Many prompts, one backbone: rows of all prompts share batches, and each gets the answer that it would get alone."""

import dataclasses
import difflib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch

from softprompt.backbones import Backbone
from softprompt.models import Sampling
from softprompt.prompts import SoftPrompt
from softprompt.serve.engine import encode
from softprompt.serve.engine.request import EngineRequest, GenerateParams, PromptNotFound
from softprompt.serve.engine.runner import BatchDone, Worker
from softprompt.serve.engine.scheduler import Scheduler
from softprompt.serve.limits import Limits, Status
from softprompt.serve.prompts.entry import (
    BASE,
    PromptEntry,
    bare,
    called,
    from_folder,
    from_prompt,
    needs_head,
    without_prompt,
)


@final
class Engine:
    """Serves prompts from one backbone: any thread may ask, one thread owns the model.

    A prompt's keys and values are computed once, when it comes. Choices are batched across prompts, and wait at most
    `max_wait` for company; texts are written in one batch that rows enter and leave between any two tokens. Answers are
    those of the row alone: equal labels and greedy texts in float32, and within rounding in bfloat16. Prompts take
    turns. A row that fails fails alone.

    Args:
        backbone: frozen; nothing else may train or change it meanwhile.
        limits: what it takes on.
        watch: told of every pass of the model, in the engine's thread.

    Raises:
        ValueError: the backbone is of a kind that prompts cannot be attached to.
    """

    def __init__(
        self, backbone: Backbone, limits: Limits | None = None, watch: Callable[[BatchDone], None] | None = None
    ) -> None:
        self.backbone = backbone
        self.limits = limits or Limits()
        self._stop: tuple[int, ...] = ()
        if not needs_head(backbone):
            # Refuses a model that it is not exact for, before a thread begins.
            self._stop = tuple(bare(backbone).end_of_sequence())
        self._served: dict[str, PromptEntry] = {}
        self._changing = threading.Lock()
        with torch.no_grad():
            self._worker = Worker(backbone, self.limits.max_batch, watch or (lambda done: None))
            self._base = None if needs_head(backbone) else without_prompt(backbone)
            if self._base is not None and self._worker.decoder is not None:
                self._base = dataclasses.replace(self._base, state=self._worker.decoder.kv_prefix(self._base.prompt))
        self._scheduler = Scheduler(self._worker, self.limits)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def prompts(self) -> list[PromptEntry]:
        """What is served, by name."""
        served = self._served.copy()  # another thread may remove one meanwhile
        return [served[name] for name in sorted(served)]

    @property
    def models(self) -> list[PromptEntry]:
        """What can be asked: the prompts, and the model without one where that says anything."""
        return self.prompts if self._base is None else [*self.prompts, self._base]

    @property
    def alive(self) -> bool:
        """Whether its thread runs and is not stuck."""
        return self._scheduler.alive

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more, for good."""
        return self._scheduler.closed

    def get(self, name: str) -> PromptEntry:
        """The prompt of that name; `base` is the model without one.

        Raises:
            Unknown: there is none.
        """
        found = self._served.get(name)
        if found is None and name == BASE:
            if self._base is None:
                raise PromptNotFound(
                    f"{called(self.backbone)} answers through a head that is trained with a prompt, and has no "
                    f"{BASE!r} to ask; name a prompt"
                )
            found = self._base
        if found is None:
            near = difflib.get_close_matches(name, [*self._served.copy(), BASE], n=3)
            names = " or ".join(map(repr, near))
            raise PromptNotFound(
                f"there is no prompt {name!r}; " + (f"did you mean {names}?" if near else "see the list of prompts")
            )
        return found

    def serves(self, name: str) -> bool:
        """Whether there is a prompt of that name."""
        return name in self._served

    def add(self, name: str, source: Path | str | SoftPrompt, *, replace: bool = False) -> PromptEntry:
        """Serve another prompt: a run, a PEFT prompt-tuning folder, or a prompt itself; the others run on.

        Args:
            replace: put it in the place of one of that name; rows that wait still get the old one's answer.

        Raises:
            FileExistsError: the name is taken.
            ValueError, FileNotFoundError: it cannot be served; nothing has changed.
            TimeoutError: the engine's thread is stuck; nothing has changed.
        """
        ready = self.ready(name, source, replace=replace)
        with self._changing:
            self._refuse_taken(name, replace)
            self.serve(ready)
        return ready

    def ready(self, name: str, source: Path | str | SoftPrompt, *, replace: bool = False) -> PromptEntry:
        """What `add` would serve, computed and not served yet; raises what `add` raises."""
        self._refuse_taken(name, replace)
        if isinstance(source, SoftPrompt):
            fresh = from_prompt(name, source, self.backbone)
        else:
            fresh = from_folder(name, Path(source).expanduser(), self.backbone)

        def compute() -> PromptEntry:
            decoder = self._worker.decoder
            if decoder is None:
                return fresh
            encode.refuse_long(self.backbone, fresh, 1, 0)
            ready = dataclasses.replace(fresh, state=(state := decoder.kv_prefix(fresh.prompt)))
            if begins := encode.beginning(self.backbone, fresh):
                ready = dataclasses.replace(ready, template_prefix=decoder.template_prefix(fresh.prompt, state, begins))
            self._refuse_endless(ready)
            return ready

        # Served by whoever asked: where that one has given up, it is not served later.
        computed: PromptEntry = self._scheduler.do(compute)
        return computed

    def serve(self, ready: PromptEntry) -> None:
        """Serve what `ready` gave, in the place of one of its name."""
        self._served[ready.name] = ready

    def remove(self, name: str) -> None:
        """Serve it no longer; rows that wait still get their answer.

        Raises:
            Unknown: there is none of that name.
        """
        self.refuse_base(name)
        self.get(name)
        self._served.pop(name, None)

    def refuse_base(self, name: str) -> None:
        """Refuse to change the model without a prompt.

        Raises:
            ValueError: it is meant.
        """
        if name == BASE:
            raise ValueError(f"{BASE!r} is the model without a prompt, and stays; take another name for a prompt")

    def classify(
        self,
        name: str,
        rows: Sequence[str | Mapping[str, Any]],
        labels: Sequence[str] | None = None,
        *,
        timeout: float | None = None,
    ) -> list[EngineRequest]:
        """Each row's choice among the prompt's labels, or among those given.

        Args:
            rows: the template's columns; a text alone where the template reads one column, or there is no template. An
                image is the bytes of its file, or those in base64; never a path.
            labels: for a prompt without a task.
            timeout: seconds; none: the engine's.

        Raises:
            Unknown: no such prompt.
            ValueError: rows or labels that cannot be.
            Full, Closed: not now.
        """
        served = self.get(name)
        seconds = self._seconds(timeout)
        if served.task is not None and served.task.image:
            work = encode.own_choice(served, labels)
            images = encode.images(self.backbone, served, rows)
            requests = [EngineRequest(served, (), work, timeout=seconds, pixels=pixels) for pixels in images]
        else:
            choices = encode.choices(self.backbone, served, rows, labels, self.limits.max_input_tokens)
            requests = [EngineRequest(served, ids, work, timeout=seconds) for ids, work in choices]
        self.submit(requests)
        return requests

    def generate(
        self,
        name: str,
        text: str | Mapping[str, Any] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        timeout: float | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> EngineRequest:
        """What the model writes behind a text, a row of the prompt's template, or tokens.

        Args:
            max_new_tokens: none: the prompt's.
            on_token: called in the engine's thread with each token; it must not block.

        Raises:
            Unknown: no such prompt.
            ValueError: a text that cannot be, or that leaves no room for the answer.
            Full, Closed: not now.
        """
        served = self.get(name)
        most = served.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= most <= self.limits.max_new_tokens:
            raise ValueError(f"max_tokens is {most}; it must be from 1 to {self.limits.max_new_tokens}")
        ids = encode.text(self.backbone, served, text, most, self.limits.max_input_tokens)
        work = GenerateParams(max_new_tokens=most, sampling=sampling or Sampling(), stop=self._stop)
        request = EngineRequest(served, ids, work, timeout=self._seconds(timeout), on_token=on_token)
        self.submit([request])
        return request

    def submit(self, requests: Sequence[EngineRequest]) -> None:
        """Let all of them wait for their turn, or none; raises `QueueFull` and `EngineClosed`.

        Raises:
            ValueError: a row has a token that the backbone has no embedding for; none of them waits.
        """
        for number, request in enumerate(requests, start=1):
            encode.refuse_unknown(self.backbone, request, f"row {number}" if len(requests) > 1 else "the text")
        self._scheduler.submit(requests)

    def status(self) -> Status:
        """What it is at."""
        waiting = self._scheduler.by_prompt()
        return Status(
            ready=self.alive and not self.closed,
            prompts=len(self._served),
            waiting=sum(waiting.values()),
            waiting_by_prompt=waiting,
            writing=self._worker.active,
            max_batch=self._worker.most,
        )

    def close(self, grace: float = 30.0) -> None:
        """Take nothing more and finish what there is; what is left after `grace` seconds fails with `EngineClosed`."""
        self._scheduler.close(grace)

    def _refuse_taken(self, name: str, replace: bool) -> None:
        self.refuse_base(name)
        if name in self._served and not replace:
            raise FileExistsError(f"the prompt name {name!r} is taken; choose another, or replace it")
        if name not in self._served and len(self._served) >= self.limits.max_prompts:
            raise ValueError(f"{len(self._served)} prompts are served, which is all that may; remove one first")

    def _refuse_endless(self, served: PromptEntry) -> None:
        """A file may hold numbers that are finite and overflow in the backbone, for every row of the prompt."""
        if not all(state.finite for state in served.states):
            raise ValueError(
                f"prompt {served.name!r} overflows in {called(self.backbone)}: its numbers are too large; train it "
                "again"
            )

    def _seconds(self, timeout: float | None) -> float:
        return self.limits.timeout if timeout is None else min(timeout, self.limits.timeout)
