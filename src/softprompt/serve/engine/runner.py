"""What the engine's one thread does with the model: batches of choices, and steps of what is being written."""

import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch

from softprompt.backbones import Backbone
from softprompt.serve.engine.generation import (
    CausalGenerationBatch,
    GeneralGenerationBatch,
    GenerationBatch,
    generation_batch_of,
)
from softprompt.serve.engine.kv_cache import CachedDecoder
from softprompt.serve.engine.request import ClassifyOutput, EngineRequest, overflow
from softprompt.serve.engine.scoring import CausalScorer, GeneralScorer, Scorer
from softprompt.serve.prompts.entry import bare

_log = logging.getLogger("softprompt.serve")
_ON_CPU = 8
"""Rows whose tokens a CPU multiplies as fast, each, as those of more."""
_CALM = 50
"""Batches that must go well before a batch may grow again after memory ran out."""


@final
@dataclass(frozen=True, kw_only=True)
class BatchDone:
    """A pass of the model is over."""

    kind: Literal["choice", "writing"]
    rows: int
    seconds: float


@final
class Worker:
    """Runs batches; what fails is tried again in halves, so that one bad row fails alone.

    Args:
        most: rows of a batch; memory that runs out halves it for a while.
        watch: told of every pass.
    """

    def __init__(self, backbone: Backbone, most: int, watch: Callable[[BatchDone], None]) -> None:
        self._backbone = backbone
        self._watch = watch
        self._allowed, self.most, self._calm = most, most, 0
        self.decoder: CachedDecoder | None = None
        if backbone.architecture == "causal":
            self.decoder = CachedDecoder(bare(backbone))
            self._score: Scorer = CausalScorer(self.decoder)
        else:
            self._score = GeneralScorer(backbone)
        self.writers: list[GenerationBatch] = []
        self.seconds_each = 0.05
        """What a row took lately."""

    @property
    def most_choices(self) -> int:
        """Rows of a batch of choices; few on a CPU.

        So rows of like length run with little padding, and answers go out while others run.
        """
        return min(self.most, _ON_CPU) if self._backbone.device.type == "cpu" else self.most

    @property
    def active(self) -> int:
        """Rows that are being written."""
        return sum(len(writer.requests) for writer in self.writers)

    def choose(self, requests: Sequence[EngineRequest]) -> None:
        """Settle a batch of choices."""
        start = time.monotonic()
        try:
            found = self._score(requests)
        except Exception as error:
            self._again(requests, error, self.choose)
            return
        self._went_well("choice", len(requests), time.monotonic() - start)
        for request, scores in zip(requests, found, strict=True):
            if any(map(math.isnan, scores)):
                self._fail(request, overflow(request))
            else:
                request.answer(ClassifyOutput(scores=scores))

    def begin(self, requests: Sequence[EngineRequest]) -> None:
        """Let rows be written from the next step on."""
        groups = [list(requests)]
        if self.decoder is None:  # a call draws all rows from one generator, so a drawn row goes alone
            greedy = [request for request in requests if not generation_batch_of(request).sampling.temperature]
            groups = [[one] for one in requests if generation_batch_of(one).sampling.temperature] + (
                [greedy] if greedy else []
            )
        for group in groups:
            self._begin(group)

    def step(self) -> None:
        """One token for every row that is being written."""
        for writer in list(self.writers):
            self._step(writer)
        self._gather()

    def drop(self) -> None:
        """Take out the rows that were given up."""
        for writer in self.writers:
            self._let_go(writer)
        self.writers = [writer for writer in self.writers if writer.requests]

    def _begin(self, requests: Sequence[EngineRequest]) -> None:
        try:
            writer: GenerationBatch = (
                GeneralGenerationBatch(bare(self._backbone), requests)
                if self.decoder is None
                else CausalGenerationBatch(self.decoder, requests)
            )
            self._advance(writer)
        except Exception as error:
            self._again(requests, error, self._begin)
            return
        self._let_go(writer)
        if writer.requests:
            self.writers.append(writer)

    def _step(self, writer: GenerationBatch) -> None:
        try:
            self._advance(writer)
        except Exception as error:
            self._note(error, len(writer.requests))
            place = self.writers.index(writer)
            if len(writer.requests) == 1:
                writer.requests[0].fail(error)
                self.writers.pop(place)
                return
            parts = self.writers[place : place + 1] = self._halves(writer, error)
            for part in parts:  # at once: rows are joined only where all stand behind a step
                self._step(part)
            return
        self._let_go(writer)
        if not writer.requests:
            self.writers.remove(writer)

    def _let_go(self, writer: GenerationBatch) -> None:
        """Take out the rows that are over; where memory is short they stay until the next step, and are passed over."""
        try:
            writer.keep([place for place, request in enumerate(writer.requests) if not request.over])
        except Exception as error:
            self._note(error, len(writer.requests))

    def _halves(self, writer: GenerationBatch, error: Exception) -> list[GenerationBatch]:
        try:
            return list(writer.halves())
        except Exception:  # not even that; nothing is left to go on with
            _log.exception("a batch could not be halved")
            for request in writer.requests:
                request.fail(error)
            return []

    def _advance(self, writer: GenerationBatch) -> None:
        """One step; nothing after `step` may fail, since what fails is done once more."""
        start, rows = time.monotonic(), list(writer.requests)
        tokens = writer.step()
        self._went_well("writing", len(rows), time.monotonic() - start)
        for request, token in zip(rows, tokens, strict=True):
            if request.over:
                continue
            try:
                request.write(token)
            except Exception as error:  # whoever listens is gone
                request.fail(error)

    def _gather(self) -> None:
        """One batch of all decoder's rows, as far as they may share one."""
        causal = [writer for writer in self.writers if isinstance(writer, CausalGenerationBatch)]
        for writer in causal[1:]:
            rows = len(causal[0].requests) + len(writer.requests)
            if rows <= self.most:
                try:
                    causal[0].take(writer)
                except Exception as error:  # both go on as they are
                    self._note(error, rows)
                    return
                self.writers.remove(writer)

    def _again(
        self, requests: Sequence[EngineRequest], error: Exception, run: Callable[[Sequence[EngineRequest]], None]
    ) -> None:
        """Both halves by themselves; a row that fails alone has failed."""
        self._note(error, len(requests))
        if len(requests) == 1:
            requests[0].fail(error)
            return
        middle = len(requests) // 2
        run(requests[:middle])
        run(requests[middle:])

    def _note(self, error: Exception, rows: int) -> None:
        if _is_memory(error):
            self.most, self._calm = max(1, min(self.most, rows) // 2), 0
            # The error's frames hold what the pass had computed, which the next try needs the memory of.
            traceback.clear_frames(error.__traceback__)
            _log.warning("memory ran out with %d rows; batches of %d from here on", rows, self.most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        elif not isinstance(error, ValueError):
            _log.error("a batch of %d rows failed: %s", rows, type(error).__name__, exc_info=error)

    def _went_well(self, kind: Literal["choice", "writing"], rows: int, seconds: float) -> None:
        if kind == "choice":
            self.seconds_each += 0.2 * (seconds / rows - self.seconds_each)
        self._calm += 1
        if self.most < self._allowed and self._calm >= _CALM:
            self.most, self._calm = min(self._allowed, 2 * self.most), 0
        try:
            self._watch(BatchDone(kind=kind, rows=rows, seconds=seconds))
        except Exception:  # whoever watches is no reason to fail a row
            _log.exception("a watcher failed")

    def _fail(self, request: EngineRequest, error: Exception) -> None:
        _log.error("prompt %s: %s", request.served.name, type(error).__name__)
        request.fail(error)


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out: CUDA has a class for it, the CPU's allocator a sentence."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )
