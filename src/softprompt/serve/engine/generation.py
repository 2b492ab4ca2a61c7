"""Rows that are being written, a token a step: a decoder's come and go, an encoder-decoder's stay to the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.evaluation.predict import pad_id
from softprompt.models import PromptedModel
from softprompt.models.sampling import Chooser
from softprompt.serve.engine.kv_cache import CachedDecoder
from softprompt.serve.engine.request import EngineRequest, GenerateParams, overflow
from softprompt.serve.engine.scoring import distinct, examples, row_of
from softprompt.tasks import collate

_OVERFLOW = -1
"""In the place of a token: the model gave no numbers."""


class GenerationBatch(ABC):
    """Rows that advance together. A step that fails leaves it as it was, so that its halves can go on instead."""

    requests: list[EngineRequest]

    @abstractmethod
    def step(self) -> list[int]:
        """The next token of each of `tickets`."""

    @abstractmethod
    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone."""

    @abstractmethod
    def halves(self) -> tuple["GenerationBatch", "GenerationBatch"]:
        """The same rows in two batches."""


@final
class CausalGenerationBatch(GenerationBatch):
    """A decoder's rows: one can leave, and others can join, between any two tokens."""

    def __init__(self, decoder: CachedDecoder, requests: Sequence[EngineRequest]) -> None:
        self._decoder = decoder
        self.requests = list(requests)
        self._batch, logits = decoder.prefill([row_of(request) for request in requests], room=1)
        self._logits: Tensor | None = logits
        self._last: list[int] = []
        self._drawn: list[int] = []
        """What the first rows have chosen in a step that broke off; a row that drew once more would draw another."""
        self._choosers = [_chooser(request, logits.device) for request in requests]

    def step(self) -> list[int]:
        """Each row by its own chooser, so that a drawn token does not depend on who else is in the batch."""
        if self._logits is None:
            fed = torch.tensor(self._last, device=self._batch.mask.device)
            self._logits = self._decoder.decode_next(self._batch, fed)
        # From here on the batch has been fed: whoever tries again chooses from these logits, and feeds nothing twice.
        logits = self._logits
        likeliest = logits.argmax(-1)
        # NaN counts as the largest. Drawing from it would fail, on a GPU together with all that comes after.
        finite = logits.gather(-1, likeliest[:, None])[:, 0].isfinite().tolist()
        for request, is_number in zip(self.requests, finite, strict=True):
            if not is_number and not request.over:
                raise overflow(request)
        best = likeliest.tolist()
        for row in range(len(self._drawn), len(self.requests)):
            choose = self._choosers[row]
            if choose is None or self.requests[row].over:
                self._drawn.append(best[row])
            else:
                self._drawn.append(int(choose(logits[row : row + 1])))
        self._last, self._drawn, self._logits = self._drawn, [], None
        return self._last

    def keep(self, places: Sequence[int]) -> None:
        """The columns that only leaving rows used are given back."""
        if len(places) < len(self.requests):
            if places:
                self._batch = self._decoder.select(self._batch, places)
            self._pick(places)

    def take(self, other: "CausalGenerationBatch") -> None:
        """Go on with another's rows too; both stand behind a step."""
        assert self._logits is None
        assert other._logits is None
        rows = [(batch, place) for batch in (self._batch, other._batch) for place in range(len(batch))]
        self._batch = self._decoder.joined(rows)
        self.requests = self.requests + other.requests
        self._last = self._last + other._last
        self._choosers = self._choosers + other._choosers

    def halves(self) -> tuple["CausalGenerationBatch", "CausalGenerationBatch"]:
        """Each with its part of the keys and values, where they are: memory may just have run out."""
        middle = len(self.requests) // 2
        first, second = self._part(slice(0, middle)), self._part(slice(middle, None))
        self._batch.layers = []  # whoever still holds this one shall not keep memory that the halves give back
        return first, second

    def _part(self, rows: slice) -> "CausalGenerationBatch":
        part = object.__new__(CausalGenerationBatch)
        part._decoder, part._batch = self._decoder, self._batch.part(rows)
        part._logits = None if self._logits is None else self._logits[rows]
        part.requests, part._choosers = self.requests[rows], self._choosers[rows]
        part._last, part._drawn = self._last[rows], self._drawn[rows]
        return part

    def _pick(self, places: Sequence[int]) -> None:
        self.requests = [self.requests[place] for place in places]
        self._last = [self._last[place] for place in places] if self._last else []
        self._drawn = [self._drawn[place] for place in places if place < len(self._drawn)]
        self._choosers = [self._choosers[place] for place in places]
        self._logits = None if self._logits is None else self._logits[list(places)]


@final
class GeneralGenerationBatch(GenerationBatch):
    """An encoder-decoder's rows, through the attachment: they begin together, and a row that ends is passed over."""

    def __init__(self, prompted: PromptedModel, requests: Sequence[EngineRequest], skipped: int = 0) -> None:
        self._prompted = prompted
        self.requests = list(requests)
        self._places = list(range(len(requests)))
        self._all = list(requests)
        self._steps = 0
        self._tokens = self._begin()
        for _ in range(skipped):
            self.step()

    def step(self) -> list[int]:
        """Of the rows that are still wanted; one that overflows fails here."""
        tokens = next(self._tokens).tolist()
        self._steps += 1
        found = [tokens[place] for place in self._places]
        for request, token in zip(self.requests, found, strict=True):
            if token == _OVERFLOW:
                request.fail(overflow(request))
        return found

    def keep(self, places: Sequence[int]) -> None:
        """The others' tokens are computed on and not looked at."""
        self._places = [self._places[place] for place in places]
        self.requests = [self._all[place] for place in self._places]

    def halves(self) -> tuple["GeneralGenerationBatch", "GeneralGenerationBatch"]:
        """From the beginning and up to the same token: what broke off cannot be gone on with."""
        middle = len(self.requests) // 2
        parts = self.requests[:middle], self.requests[middle:]
        first, second = (GeneralGenerationBatch(self._prompted, part, self._steps) for part in parts)
        return first, second

    def _begin(self) -> Iterator[Tensor]:
        backbone = self._prompted.backbone
        prompts, index = distinct(self._all)
        inputs = collate(examples(self._all), pad_id=pad_id(backbone), side="left", with_answers=False)
        works = [generation_batch_of(request) for request in self._all]
        return self._prompted.generate(
            inputs.input_ids.to(backbone.device),
            inputs.attention_mask.to(backbone.device),
            max_new_tokens=max(work.max_new_tokens for work in works),
            sampling=works[0].sampling,
            stop=(_OVERFLOW,),  # whose row has ended otherwise is the engine's to say
            prompts=[one.prompt for one in prompts],
            index=torch.tensor(index, device=backbone.device),
        )


def generation_batch_of(request: EngineRequest) -> GenerateParams:
    """What is asked for."""
    assert isinstance(request.work, GenerateParams)
    return request.work


def _chooser(request: EngineRequest, device: torch.device) -> Callable[[Float[Tensor, "one vocab"]], Tensor] | None:
    """None for the likeliest token, which all such rows choose at once."""
    sampling = generation_batch_of(request).sampling
    return Chooser(sampling, device) if sampling.temperature else None
