"""Rows that are being written, a token a step: a decoder's come and go, an encoder-decoder's stay to the end."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from softprompt.evaluation.predict import pad_id
from softprompt.models import Attachment
from softprompt.models.sampling import Chooser
from softprompt.serve.engine.kv_cache import Decoder
from softprompt.serve.engine.request import Ticket, Writing, overflow
from softprompt.serve.engine.scoring import distinct, examples, row_of
from softprompt.tasks import collate

_OVERFLOW = -1
"""In the place of a token: the model gave no numbers."""


class Writer(ABC):
    """Rows that advance together. A step that fails leaves it as it was, so that its halves can go on instead."""

    tickets: list[Ticket]

    @abstractmethod
    def step(self) -> list[int]:
        """The next token of each of `tickets`."""

    @abstractmethod
    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone."""

    @abstractmethod
    def halves(self) -> tuple["Writer", "Writer"]:
        """The same rows in two batches."""


@final
class CausalWriter(Writer):
    """A decoder's rows: one can leave, and others can join, between any two tokens."""

    def __init__(self, decoder: Decoder, tickets: Sequence[Ticket]) -> None:
        self._decoder = decoder
        self.tickets = list(tickets)
        self._batch, logits = decoder.read([row_of(ticket) for ticket in tickets], room=1)
        self._logits: Tensor | None = logits
        self._last: list[int] = []
        self._drawn: list[int] = []
        """What the first rows have chosen in a step that broke off; a row that drew once more would draw another."""
        self._choosers = [_chooser(ticket, logits.device) for ticket in tickets]

    def step(self) -> list[int]:
        """Each row by its own chooser, so that a drawn token does not depend on who else is in the batch."""
        if self._logits is None:
            fed = torch.tensor(self._last, device=self._batch.mask.device)
            self._logits = self._decoder.advance(self._batch, fed)
        # From here on the batch has been fed: whoever tries again chooses from these logits, and feeds nothing twice.
        logits = self._logits
        likeliest = logits.argmax(-1)
        # NaN counts as the largest. Drawing from it would fail, on a GPU together with all that comes after.
        finite = logits.gather(-1, likeliest[:, None])[:, 0].isfinite().tolist()
        for ticket, is_number in zip(self.tickets, finite, strict=True):
            if not is_number and not ticket.over:
                raise overflow(ticket)
        best = likeliest.tolist()
        for row in range(len(self._drawn), len(self.tickets)):
            choose = self._choosers[row]
            if choose is None or self.tickets[row].over:
                self._drawn.append(best[row])
            else:
                self._drawn.append(int(choose(logits[row : row + 1])))
        self._last, self._drawn, self._logits = self._drawn, [], None
        return self._last

    def keep(self, places: Sequence[int]) -> None:
        """The columns that only leaving rows used are given back."""
        if len(places) < len(self.tickets):
            if places:
                self._batch = self._decoder.select(self._batch, places)
            self._pick(places)

    def take(self, other: "CausalWriter") -> None:
        """Go on with another's rows too; both stand behind a step."""
        assert self._logits is None
        assert other._logits is None
        rows = [(batch, place) for batch in (self._batch, other._batch) for place in range(len(batch))]
        self._batch = self._decoder.joined(rows)
        self.tickets = self.tickets + other.tickets
        self._last = self._last + other._last
        self._choosers = self._choosers + other._choosers

    def halves(self) -> tuple["CausalWriter", "CausalWriter"]:
        """Each with its part of the keys and values, where they are: memory may just have run out."""
        middle = len(self.tickets) // 2
        first, second = self._part(slice(0, middle)), self._part(slice(middle, None))
        self._batch.layers = []  # whoever still holds this one shall not keep memory that the halves give back
        return first, second

    def _part(self, rows: slice) -> "CausalWriter":
        part = object.__new__(CausalWriter)
        part._decoder, part._batch = self._decoder, self._batch.part(rows)
        part._logits = None if self._logits is None else self._logits[rows]
        part.tickets, part._choosers = self.tickets[rows], self._choosers[rows]
        part._last, part._drawn = self._last[rows], self._drawn[rows]
        return part

    def _pick(self, places: Sequence[int]) -> None:
        self.tickets = [self.tickets[place] for place in places]
        self._last = [self._last[place] for place in places] if self._last else []
        self._drawn = [self._drawn[place] for place in places if place < len(self._drawn)]
        self._choosers = [self._choosers[place] for place in places]
        self._logits = None if self._logits is None else self._logits[list(places)]


@final
class AttachedWriter(Writer):
    """An encoder-decoder's rows, through the attachment: they begin together, and a row that ends is passed over."""

    def __init__(self, attachment: Attachment, tickets: Sequence[Ticket], skipped: int = 0) -> None:
        self._attachment = attachment
        self.tickets = list(tickets)
        self._places = list(range(len(tickets)))
        self._all = list(tickets)
        self._steps = 0
        self._tokens = self._begin()
        for _ in range(skipped):
            self.step()

    def step(self) -> list[int]:
        """Of the rows that are still wanted; one that overflows fails here."""
        tokens = next(self._tokens).tolist()
        self._steps += 1
        found = [tokens[place] for place in self._places]
        for ticket, token in zip(self.tickets, found, strict=True):
            if token == _OVERFLOW:
                ticket.fail(overflow(ticket))
        return found

    def keep(self, places: Sequence[int]) -> None:
        """The others' tokens are computed on and not looked at."""
        self._places = [self._places[place] for place in places]
        self.tickets = [self._all[place] for place in self._places]

    def halves(self) -> tuple["AttachedWriter", "AttachedWriter"]:
        """From the beginning and up to the same token: what broke off cannot be gone on with."""
        middle = len(self.tickets) // 2
        parts = self.tickets[:middle], self.tickets[middle:]
        first, second = (AttachedWriter(self._attachment, part, self._steps) for part in parts)
        return first, second

    def _begin(self) -> Iterator[Tensor]:
        backbone = self._attachment.backbone
        prompts, index = distinct(self._all)
        inputs = collate(examples(self._all), pad_id=pad_id(backbone), side="left", with_answers=False)
        works = [writing_of(ticket) for ticket in self._all]
        return self._attachment.generate(
            inputs.input_ids.to(backbone.device),
            inputs.attention_mask.to(backbone.device),
            max_new_tokens=max(work.max_new_tokens for work in works),
            sampling=works[0].sampling,
            stop=(_OVERFLOW,),  # whose row has ended otherwise is the engine's to say
            prompts=[one.prompt for one in prompts],
            index=torch.tensor(index, device=backbone.device),
        )


def writing_of(ticket: Ticket) -> Writing:
    """What is asked for."""
    assert isinstance(ticket.work, Writing)
    return ticket.work


def _chooser(ticket: Ticket, device: torch.device) -> Callable[[Float[Tensor, "one vocab"]], Tensor] | None:
    """None for the likeliest token, which all such rows choose at once."""
    sampling = writing_of(ticket).sampling
    return Chooser(sampling, device) if sampling.temperature else None
