"""Tokens as text while they come: whole characters only, and not beyond a stop."""

from collections.abc import Sequence
from typing import Any, final

_HALF = "\ufffd"
"""What a tokenizer writes for a character of which tokens are still to come."""


@final
class IncrementalDetokenizer:
    """The text of one answer, piece by piece; the pieces together are the whole.

    Special tokens are no part of the text, but a stop may name one: `<|im_start|>` ends the text where that is written.

    Args:
        stops: texts that end it; they are not part of it, nor is what follows.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._special: dict[int, str] = {}
        if stops:
            ids = list(tokenizer.all_special_ids)
            self._special = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
        self._tokens: list[int] = []
        self._start, self._read = 0, 0
        self._held: list[tuple[str, bool]] = []
        """Characters that are not given out yet, each with whether it is of a special token and never will be."""
        self.stopped = False
        """Whether a stop has been met."""
        self.count = 0
        """Tokens up to here, or up to the one that completed the stop."""

    def add(self, token: int) -> str:
        """What this token adds; nothing while a character or a stop may go on."""
        self._tokens.append(token)
        if not self.stopped:
            self.count = len(self._tokens)
        if (name := self._special.get(token)) is not None:
            return self._release(self._advance(self._text()), name, last=False)
        text = self._text()
        # A stop may be whole although the character behind it is not.
        if text.endswith(_HALF) and self._stop_in(text[len(self._before()) :].rstrip(_HALF)) is None:
            return ""
        return self._release(self._advance(text), last=False)

    def end(self) -> str:
        """What is left when no token follows."""
        return self._release(self._advance(self._text()), last=True)

    def _text(self) -> str:
        return self._decode(self._tokens[self._start :])

    def _before(self) -> str:
        return self._decode(self._tokens[self._start : self._read])

    def _advance(self, text: str) -> str:
        # Some tokenizers change a text's first space: each piece is read behind the piece before it.
        before, start, read = len(self._before()), self._start, self._read
        self._start, self._read = self._read, len(self._tokens)
        new = text[before:]
        if self._stops and (at := self._stop_in(new)) is not None and not self.stopped:
            # What was held back for a character to come may have had the stop some tokens ago.
            ends = range(read + 1, len(self._tokens) + 1)
            texts = (self._decode(self._tokens[start:end])[before:] for end in ends)
            self.count = next(end for end, part in zip(ends, texts, strict=True) if self._stop_in(part) == at)
        return new

    def _stop_in(self, new: str) -> int | None:
        return self._stop_at([*self._held, *((sign, False) for sign in new)])

    def _release(self, new: str, special: str = "", *, last: bool) -> str:
        if self.stopped:
            return ""
        held = [*self._held, *((sign, False) for sign in new), *((sign, True) for sign in special)]
        at = self._stop_at(held)
        if at is not None:
            self.stopped, self._held = True, []
            return _shown(held[:at])
        keep = 0
        if not last and self._stops:
            written, shown = "".join(sign for sign, _ in held), _shown(held)
            keep = max(_overlap(written, stop) for stop in self._stops)
            if seen := max(_overlap(shown, stop) for stop in self._stops):
                keep = max(keep, len(held) - [at for at, (_, hidden) in enumerate(held) if not hidden][-seen])
        self._held = held[len(held) - keep :]
        return _shown(held[: len(held) - keep])

    def _stop_at(self, held: Sequence[tuple[str, bool]]) -> int | None:
        """Where the first stop begins, in the text with its special tokens or in the text that is shown."""
        written, shown = "".join(sign for sign, _ in held), _shown(held)
        found = [at for stop in self._stops if (at := written.find(stop)) >= 0]
        places = [at for at, (_, hidden) in enumerate(held) if not hidden]
        found += [places[at] for stop in self._stops if (at := shown.find(stop)) >= 0]
        return min(found, default=None)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _shown(held: Sequence[tuple[str, bool]]) -> str:
    return "".join(sign for sign, hidden in held if not hidden)


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
