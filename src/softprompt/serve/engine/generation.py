"""Batches of running generations, one token per step.

Rows of a decoder join and leave their batch between any two steps; those of an encoder-decoder start together.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.evaluation.predict import pad_id
from softprompt.models import PromptedModel
from softprompt.models.sampling import Chooser
from softprompt.serve.engine.kv_cache import Batch, CachedDecoder, Row
from softprompt.serve.engine.logits import LogitAdjuster, TokenLogprob, token_logprobs
from softprompt.serve.engine.request import EngineRequest, overflow_error
from softprompt.serve.engine.scoring import examples, kv_row, unique_prompts
from softprompt.tasks.data.collate import collate

_OVERFLOW = -1
"""In place of a token id: the logits were not finite."""


class GenerationBatch(ABC):
    """Rows that are decoded together. A step that raises changes nothing, so the batch can be split and retried."""

    requests: list[EngineRequest]
    logprobs: list[TokenLogprob | None]
    """Of each token of the last step, where its request asks for it."""

    @abstractmethod
    def step(self) -> list[int]:
        """The next token of each of `requests`."""

    @abstractmethod
    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only."""

    @abstractmethod
    def split(self) -> tuple["GenerationBatch", "GenerationBatch"]:
        """The same rows in two batches."""


@final
class CausalGenerationBatch(GenerationBatch):
    """Rows of a decoder over one KV cache."""

    def __init__(self, decoder: CachedDecoder, requests: Sequence[EngineRequest]) -> None:
        self._decoder = decoder
        self.requests = list(requests)
        self.logprobs = []
        if any(request.generation.score_input for request in requests):
            self._batch, logits = _prefill_scored(decoder, requests)
        else:
            self._batch, logits = decoder.prefill([kv_row(request) for request in requests], room=_room(requests))
        self._logits: Tensor | None = logits
        self._last_tokens: list[int] = []
        self._partial_tokens: list[int] = []
        """Tokens of the first rows in a step that failed halfway; sampling these rows again would give other tokens."""
        self._samplers = [_sampler(request, logits.device) for request in requests]

    def step(self) -> list[int]:
        """Each row has its own sampler, so its tokens do not depend on the other rows."""
        if self._logits is None:
            last = torch.tensor(self._last_tokens, device=self._batch.mask.device)
            self._logits = self._decoder.decode_next(self._batch, last)
        # The cache now holds the last tokens: a retry starts from these logits and does not feed them again.
        logits = self._logits
        likeliest = logits.argmax(-1)
        # argmax returns NaN where there is any. Sampling from it would fail, on a GPU with all later operations.
        finite = logits.gather(-1, likeliest[:, None])[:, 0].isfinite().tolist()
        for request, is_finite in zip(self.requests, finite, strict=True):
            if not is_finite and not request.done:
                raise overflow_error(request)
        greedy = likeliest.tolist()
        for row in range(len(self._partial_tokens), len(self.requests)):
            sampler = self._samplers[row]
            if sampler is None or self.requests[row].done:
                self._partial_tokens.append(greedy[row])
            else:
                self._partial_tokens.append(int(sampler(logits[row : row + 1])))
        self.logprobs = [
            None
            if request.generation.logprobs is None or request.done
            else token_logprobs(logits[row : row + 1], [token], request.generation.logprobs)[0]
            for row, (request, token) in enumerate(zip(self.requests, self._partial_tokens, strict=True))
        ]
        self._last_tokens, self._partial_tokens, self._logits = self._partial_tokens, [], None
        return self._last_tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only; columns that no other row uses are freed."""
        if len(rows) == len(self.requests):
            return
        if rows:
            self._batch = self._decoder.select(self._batch, rows)
        self.requests = [self.requests[row] for row in rows]
        self._last_tokens = [self._last_tokens[row] for row in rows] if self._last_tokens else []
        self._partial_tokens = [self._partial_tokens[row] for row in rows if row < len(self._partial_tokens)]
        self._samplers = [self._samplers[row] for row in rows]
        if self._logits is not None:
            self._logits = self._logits[torch.tensor(rows, dtype=torch.long, device=self._logits.device)]

    def merge(self, other: "CausalGenerationBatch") -> None:
        """Add the rows of `other`; both batches must have completed their step."""
        assert self._logits is None
        assert other._logits is None
        rows = [(batch, row) for batch in (self._batch, other._batch) for row in range(len(batch))]
        self._batch = self._decoder.concat(rows)
        self.requests = self.requests + other.requests
        self._last_tokens = self._last_tokens + other._last_tokens
        self._samplers = self._samplers + other._samplers

    def split(self) -> tuple["CausalGenerationBatch", "CausalGenerationBatch"]:
        """Two halves over views of the same KV cache, since memory may just have run out."""
        middle = len(self.requests) // 2
        first, second = self._slice(slice(0, middle)), self._slice(slice(middle, None))
        self._batch.layers = []  # so that a reference to this batch does not keep memory that the halves free
        return first, second

    def _slice(self, rows: slice) -> "CausalGenerationBatch":
        part = object.__new__(CausalGenerationBatch)
        part._decoder, part._batch = self._decoder, self._batch.part(rows)
        part._logits = None if self._logits is None else self._logits[rows]
        part.requests, part._samplers = self.requests[rows], self._samplers[rows]
        part._last_tokens, part._partial_tokens = self._last_tokens[rows], self._partial_tokens[rows]
        part.logprobs = []
        return part


@final
class Seq2SeqGenerationBatch(GenerationBatch):
    """Rows of an encoder-decoder, through `PromptedModel.generate`; rows that end are computed on and ignored."""

    def __init__(self, prompted: PromptedModel, requests: Sequence[EngineRequest], num_skipped: int = 0) -> None:
        self._prompted = prompted
        self.requests = list(requests)
        self.logprobs = []
        self._rows = list(range(len(requests)))
        """The row of each of `requests` among the rows that the batch started with."""
        self._started = list(requests)
        self._num_steps = 0
        self._tokens = self._generate()
        for _ in range(num_skipped):
            self.step()

    def step(self) -> list[int]:
        """The next token of each row; a row whose logits overflow fails here."""
        tokens = next(self._tokens).tolist()
        self._num_steps += 1
        tokens = [tokens[row] for row in self._rows]
        self.logprobs = [None] * len(tokens)
        for request, token in zip(self.requests, tokens, strict=True):
            if token == _OVERFLOW:
                request.fail(overflow_error(request))
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only; the others are still computed."""
        self._rows = [self._rows[row] for row in rows]
        self.requests = [self._started[row] for row in self._rows]

    def split(self) -> tuple["Seq2SeqGenerationBatch", "Seq2SeqGenerationBatch"]:
        """Two halves, generated again from the start up to the current token: a failed generator cannot continue."""
        middle = len(self.requests) // 2
        halves = self.requests[:middle], self.requests[middle:]
        first, second = (Seq2SeqGenerationBatch(self._prompted, half, self._num_steps) for half in halves)
        return first, second

    def _generate(self) -> Iterator[Tensor]:
        backbone = self._prompted.backbone
        entries, index = unique_prompts(self._started)
        inputs = collate(examples(self._started), pad_id=pad_id(backbone), side="left", with_answers=False)
        return self._prompted.generate(
            inputs.input_ids.to(backbone.device),
            inputs.attention_mask.to(backbone.device),
            # An input that is only echoed takes part in one step, whose token it ignores.
            max_new_tokens=max(1, *(request.generation.max_new_tokens for request in self._started)),
            sampling=self._started[0].generation.sampling,
            stop=(_OVERFLOW,),  # stop tokens are per request, and the engine checks them
            prompts=[entry.prompt for entry in entries],
            index=torch.tensor(index, device=backbone.device),
        )


def _sampler(request: EngineRequest, device: torch.device) -> Callable[[Float[Tensor, "one vocab"]], Tensor] | None:
    """The row's own sampler; None for greedy decoding, which one argmax does for all rows."""
    params = request.generation
    if not params.adjusts_logits:
        return Chooser(params.sampling, device) if params.sampling.temperature else None
    choose = Chooser(params.sampling, device)
    adjust = LogitAdjuster(params.logit_bias, params.presence_penalty, params.frequency_penalty, device)
    return lambda logits: choose(adjust(logits, request.tokens))


def _room(requests: Sequence[EngineRequest]) -> int:
    """Columns to leave free: one for the first token that follows, none where every input is only scored."""
    return int(any(request.generation.max_new_tokens for request in requests))


def _prefill_scored(
    decoder: CachedDecoder, requests: Sequence[EngineRequest]
) -> tuple[Batch, Float[Tensor, "row vocab"]]:
    """Start rows, and set the `input_logprobs` of those that ask for them."""
    scored: list[list[TokenLogprob]] = [[] for _ in requests]

    def score(row: int, first: int, logits: Float[Tensor, "token vocab"]) -> None:
        request = requests[row]
        following = request.ids[first + 1 : first + 1 + len(logits)]
        if request.generation.score_input and following:
            scored[row] += token_logprobs(logits[: len(following)], following, request.generation.logprobs or 0)

    # A cached template prefix has no logits for its tokens.
    rows = [
        Row(request.ids, request.entry.prompt, request.entry.kv_prefixes[0])
        if request.generation.score_input
        else kv_row(request)
        for request in requests
    ]
    batch, logits = decoder.prefill(rows, room=_room(requests), visit=score)
    for request, entries in zip(requests, scored, strict=True):
        if any(math.isnan(entry.logprob) for entry in entries):
            raise overflow_error(request)
        request.input_logprobs = tuple(entries)
    return batch, logits
