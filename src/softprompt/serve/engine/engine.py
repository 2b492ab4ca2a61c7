"""Many prompts over one backbone: rows of all prompts share batches, and each gets the answer it would get alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import final

import torch

from softprompt.backbones import Backbone
from softprompt.models import attach
from softprompt.serve.engine import encode
from softprompt.serve.engine.base import BaseEngine, EngineStatus
from softprompt.serve.engine.limits import Limits
from softprompt.serve.engine.request import EngineRequest
from softprompt.serve.engine.runner import BatchStats, ModelRunner
from softprompt.serve.engine.scheduler import Scheduler
from softprompt.serve.engine.threads import call_in_own_thread
from softprompt.serve.prompts.entry import PromptEntry, base_entry, needs_head


@final
class Engine(BaseEngine):
    """Serves prompts over one backbone: any thread may send requests, and one thread runs the model.

    A prompt's keys and values are computed once, when it is added. Classifications are batched across prompts and wait
    at most `max_wait` for others; generations share one batch that rows enter and leave between any two tokens.
    Results are those of the row alone: equal labels and greedy texts in float32, and within rounding in bfloat16.
    Prompts take turns. A row that fails fails alone. On a CPU the engine is faster where no other thread has run the
    model before (see `call_in_own_thread`); `softprompt serve` sees to that.

    Args:
        backbone: frozen; nothing else may train or change it meanwhile.
        limits: bounds on batches, the queue and requests.
        on_batch: called in the engine's thread after every forward pass.

    Raises:
        ValueError: prompts cannot be attached to the backbone.
    """

    def __init__(
        self, backbone: Backbone, limits: Limits | None = None, on_batch: Callable[[BatchStats], None] | None = None
    ) -> None:
        limits = limits or Limits()

        @torch.no_grad()
        def start() -> tuple[ModelRunner, PromptEntry | None, tuple[int, ...]]:
            # `attach` rejects a model whose batched results are not exact, before the engine's thread starts.
            stop = () if needs_head(backbone) else tuple(attach(backbone).end_of_sequence())
            runner = ModelRunner(backbone, limits.max_batch, on_batch or (lambda stats: None))
            base = None if needs_head(backbone) else base_entry(backbone)
            if base is not None and runner.decoder is not None:
                base = dataclasses.replace(base, kv_prefix=runner.decoder.kv_prefix(base.prompt))
            return runner, base, stop

        self._runner, base, stop = call_in_own_thread(start)
        super().__init__(backbone, base, stop, limits)
        self._scheduler = Scheduler(self._runner, limits)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs and is not stuck."""
        return self._scheduler.alive

    @property
    def closed(self) -> bool:
        """Whether new requests are refused, for good."""
        return self._scheduler.closed

    def status(self) -> EngineStatus:
        """A snapshot of the queue and of running generations."""
        queued = self._scheduler.queued_by_prompt()
        return EngineStatus(
            ready=self.alive and not self.closed,
            prompts=len(self._entries),
            queued=sum(queued.values()),
            queued_by_prompt=queued,
            generating=len(self._runner.generating),
            max_batch=self._runner.max_batch,
        )

    def close(self, grace: float = 30.0) -> None:
        """Refuse new requests and finish the others; those left after `grace` seconds fail with `EngineClosed`."""
        self._scheduler.close(grace)

    def _complete(self, entry: PromptEntry) -> PromptEntry:
        # It may have to wait for the tokenizer, and the engine's thread must not.
        ids = () if self._runner.decoder is None else encode.template_prefix(self.backbone, entry)

        def compute() -> PromptEntry:
            decoder = self._runner.decoder
            if decoder is None:
                return entry
            encode.check_length(self.backbone, entry, 1, 0)
            kv_prefix = decoder.kv_prefix(entry.prompt)
            completed = dataclasses.replace(entry, kv_prefix=kv_prefix)
            if ids:
                template_prefix = decoder.template_prefix(entry.prompt, kv_prefix, ids)
                completed = dataclasses.replace(completed, template_prefix=template_prefix)
            # Finite values in a file may still overflow in the backbone, for every row of the prompt.
            if not all(prefix.is_finite for prefix in completed.kv_prefixes):
                raise self._overflow(entry)
            return completed

        completed: PromptEntry = self._scheduler.run_job(compute)
        return completed

    def _submit(self, requests: Sequence[EngineRequest]) -> None:
        self._scheduler.submit(requests)
