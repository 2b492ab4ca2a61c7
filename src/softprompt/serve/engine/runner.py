"""Runs the model in the engine's thread: batches of classifications, and steps of generations."""

import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch

from softprompt.backbones import Backbone
from softprompt.models import attach, model_class
from softprompt.serve.engine.generation import CausalGenerationBatch, GenerationBatch, Seq2SeqGenerationBatch
from softprompt.serve.engine.kv_cache import CachedDecoder
from softprompt.serve.engine.request import (
    ClassifyOutput,
    ClassifyParams,
    EngineRequest,
    GenerateParams,
    RequestKind,
    overflow_error,
)
from softprompt.serve.engine.scoring import CausalScorer, GeneralScorer, Scorer

_log = logging.getLogger("softprompt.serve")
_MAX_CLASSIFY_ON_CPU = 8
"""Rows per classification batch on a CPU, where larger batches are not faster per row."""
_STEPS_UNTIL_GROWTH = 50
"""Successful batches after which a batch size that was halved for want of memory doubles again."""

Kind = Literal["classify", "generate"]


@final
@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """One forward pass: its kind, size and duration."""

    kind: Kind
    """What its rows asked for."""
    rows: int
    """Rows in the pass."""
    seconds: float
    """How long it took."""


@final
class ModelRunner:
    """Runs batches; one that fails is retried in halves, so that a bad row fails alone.

    Args:
        backbone: the frozen model.
        max_batch: rows per batch; halved for a while when memory runs out.
        on_batch: called after every forward pass.
    """

    def __init__(self, backbone: Backbone, max_batch: int, on_batch: Callable[[BatchStats], None]) -> None:
        self._backbone = backbone
        self._on_batch = on_batch
        self._configured_max_batch, self.max_batch, self._successes = max_batch, max_batch, 0
        self.decoder: CachedDecoder | None = None
        if model_class(backbone).decoder_only:
            self.decoder = CachedDecoder(attach(backbone))
            self._scorer: Scorer = CausalScorer(self.decoder)
        else:
            self._scorer = GeneralScorer(backbone)
        self.batches: list[GenerationBatch] = []
        """The running generations."""
        self.seconds_per_row: dict[RequestKind, float] = {
            ClassifyParams: 0.05,
            GenerateParams: 0.05,
        }
        """Moving averages over classifications and over texts, each row's share of its batch's time."""

    @property
    def max_classify_batch(self) -> int:
        """Rows per classification batch; few on a CPU.

        Small batches hold rows of similar length, with little padding, and results go out while others run.
        """
        on_cpu = self._backbone.device.type == "cpu"
        return min(self.max_batch, _MAX_CLASSIFY_ON_CPU) if on_cpu else self.max_batch

    @property
    def generating(self) -> list[EngineRequest]:
        """The requests of the running generations."""
        return [request for batch in self.batches for request in batch.requests]

    def classify(self, requests: Sequence[EngineRequest]) -> None:
        """Finish a batch of classifications."""
        start = time.monotonic()
        try:
            scores = self._scorer(requests)
        except Exception as error:
            self._retry_in_halves(requests, error, self.classify)
            return
        self._record_success("classify", len(requests), time.monotonic() - start)
        for request, row in zip(requests, scores, strict=True):
            if any(map(math.isnan, row)):
                _log.error("prompt %s: the logits overflow", request.entry.name)
                request.fail(overflow_error(request))
            else:
                request.finish(ClassifyOutput(logprobs=row))

    def prefill(self, requests: Sequence[EngineRequest]) -> None:
        """Start generations, with their first token."""
        groups: list[Sequence[EngineRequest]] = [requests]
        if self.decoder is None:  # a batch samples all its rows from one generator, so a sampled row runs alone
            greedy = [request for request in requests if not request.generation.sampling.temperature]
            groups = [[request] for request in requests if request.generation.sampling.temperature]
            groups += [greedy] if greedy else []
        for group in groups:
            self._start_batch(group)

    def decode(self) -> None:
        """Generate one token for every running generation, then merge batches where possible."""
        for batch in list(self.batches):
            self._decode_batch(batch)
        self._merge_batches()

    def drop_done(self) -> None:
        """Remove requests that were given up."""
        for batch in self.batches:
            self._drop_done_rows(batch)
        self.batches = [batch for batch in self.batches if batch.requests]

    def _start_batch(self, requests: Sequence[EngineRequest]) -> None:
        try:
            batch: GenerationBatch = (
                Seq2SeqGenerationBatch(attach(self._backbone), requests)
                if self.decoder is None
                else CausalGenerationBatch(self.decoder, requests)
            )
            self._step(batch)
        except Exception as error:
            self._retry_in_halves(requests, error, self._start_batch)
            return
        self._drop_done_rows(batch)
        if batch.requests:
            self.batches.append(batch)

    def _decode_batch(self, batch: GenerationBatch) -> None:
        try:
            self._step(batch)
        except Exception as error:
            self._record_failure(error, len(batch.requests))
            index = self.batches.index(batch)
            if len(batch.requests) == 1:
                batch.requests[0].fail(error)
                self.batches.pop(index)
                return
            halves = self.batches[index : index + 1] = self._split(batch, error)
            for half in halves:  # in this step, since only batches that have completed it can be merged
                self._decode_batch(half)
            return
        self._drop_done_rows(batch)
        if not batch.requests:
            self.batches.remove(batch)

    def _drop_done_rows(self, batch: GenerationBatch) -> None:
        """Remove finished rows; where memory is too short for that, they stay until the next step and are ignored."""
        try:
            batch.keep([row for row, request in enumerate(batch.requests) if not request.done])
        except Exception as error:
            self._record_failure(error, len(batch.requests))

    def _split(self, batch: GenerationBatch, error: Exception) -> list[GenerationBatch]:
        try:
            return list(batch.split())
        except Exception:
            _log.exception("a batch could not be split")
            for request in batch.requests:
                request.fail(error)
            return []

    def _step(self, batch: GenerationBatch) -> None:
        """Generate one token per row. Nothing after `step` may raise: a step that fails is run again."""
        start, requests = time.monotonic(), list(batch.requests)
        tokens = batch.step()
        seconds = time.monotonic() - start
        self._record_success("generate", len(requests), seconds)
        for request, token, logprob in zip(requests, tokens, batch.logprobs, strict=True):
            if request.done:
                continue
            try:
                request.append_token(token, logprob)
            except Exception as error:  # raised by the caller's on_token
                request.fail(error)
            if request.done:
                self._average(GenerateParams, len(request.tokens) * seconds / len(requests))

    def _merge_batches(self) -> None:
        """Merge the batches of a decoder into one, up to `max_batch` rows."""
        batches = [batch for batch in self.batches if isinstance(batch, CausalGenerationBatch)]
        for batch in batches[1:]:
            rows = len(batches[0].requests) + len(batch.requests)
            if rows <= self.max_batch:
                try:
                    batches[0].merge(batch)
                except Exception as error:  # both continue as they are
                    self._record_failure(error, rows)
                    return
                self.batches.remove(batch)

    def _retry_in_halves(
        self, requests: Sequence[EngineRequest], error: Exception, run: Callable[[Sequence[EngineRequest]], None]
    ) -> None:
        self._record_failure(error, len(requests))
        if len(requests) == 1:
            requests[0].fail(error)
            return
        middle = len(requests) // 2
        run(requests[:middle])
        run(requests[middle:])

    def _record_failure(self, error: Exception, rows: int) -> None:
        if _is_out_of_memory(error):
            self.max_batch, self._successes = max(1, min(self.max_batch, rows) // 2), 0
            # The error's frames hold tensors of the failed pass, whose memory the retry needs.
            traceback.clear_frames(error.__traceback__)
            _log.warning("out of memory with %d rows; batches have at most %d for now", rows, self.max_batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        elif not isinstance(error, ValueError):
            _log.error("a batch of %d rows failed: %s", rows, type(error).__name__, exc_info=error)

    def _record_success(self, kind: Kind, rows: int, seconds: float) -> None:
        if kind == "classify":
            self._average(ClassifyParams, seconds / rows)
        self._successes += 1
        if self.max_batch < self._configured_max_batch and self._successes >= _STEPS_UNTIL_GROWTH:
            self.max_batch, self._successes = min(self._configured_max_batch, 2 * self.max_batch), 0
        try:
            self._on_batch(BatchStats(kind=kind, rows=rows, seconds=seconds))
        except Exception:  # a failing callback must not fail a row
            _log.exception("on_batch failed")

    def _average(self, kind: RequestKind, seconds: float) -> None:
        self.seconds_per_row[kind] += 0.2 * (seconds - self.seconds_per_row[kind])


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: CUDA has its own error class, the CPU's allocator only a message."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in message or "not enough memory" in message)
    )
