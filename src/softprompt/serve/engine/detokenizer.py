"""Decodes a growing answer: gives out full characters only, and nothing from a stop text on."""

from collections.abc import Sequence
from typing import Any, final

from softprompt.models.sampling import special_ids

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes to for a character whose tokens are not all there."""
_MAX_CONTEXT = 64
"""Tokens of an input that its answer is decoded with."""


@final
class IncrementalDetokenizer:
    """The text of one answer, piece by piece; the pieces joined are the full text.

    Special tokens are not part of the text, but a stop may name one: `<|im_start|>` ends the text at that token.

    Args:
        stops: texts that end the answer; neither they nor what follows is part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._special: dict[int, str] = {}
        if stops:
            ids = sorted(special_ids(tokenizer))
            self._special = dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
        self._tokens: list[int] = []
        self._num_context = self._prefix_offset = self._read_offset = 0
        self._pending: list[tuple[str, bool]] = []
        """Characters not given out yet, and whether each belongs to a special token and never will be."""
        self.stopped = False
        """Whether a stop was reached."""
        self.count = 0
        """Tokens so far, or up to the one that completed the stop."""

    @property
    def continues_text(self) -> bool:
        """Whether the answer has a text before it."""
        return not special_ids(self._tokenizer).issuperset(self._tokens[: self._num_context])

    def continue_after(self, tokens: Sequence[int]) -> None:
        """Decode the answer as the continuation of `tokens`: some tokenizers strip the first space of a text."""
        context = list(tokens[-_MAX_CONTEXT:])
        if not self._decode(context).endswith(_INCOMPLETE):
            self._tokens, self._num_context = context, len(context)
            self._read_offset = self._num_context

    def add(self, token: int) -> str:
        """The text that this token adds; empty while a character or a stop may be incomplete."""
        self._tokens.append(token)
        if not self.stopped:
            self.count = len(self._tokens) - self._num_context
        if (name := self._special.get(token)) is not None:
            return self._release(self._new_text(self._text()), name, last=False)
        text = self._text()
        # A stop may be complete although the character after it is not.
        if text.endswith(_INCOMPLETE) and self._stop_in(text[len(self._prefix()) :].rstrip(_INCOMPLETE)) is None:
            return ""
        return self._release(self._new_text(text), last=False)

    def end(self) -> str:
        """The rest of the text, once no token follows."""
        return self._release(self._new_text(self._text()), last=True)

    def _text(self) -> str:
        return self._decode(self._tokens[self._prefix_offset :])

    def _prefix(self) -> str:
        return self._decode(self._tokens[self._prefix_offset : self._read_offset])

    def _new_text(self, text: str) -> str:
        """What `text` adds to its prefix; moves both offsets on."""
        # Some tokenizers change a text's first space, so each piece is decoded together with the one before it, and
        # with special tokens between the two, which have no text.
        length, start, read = len(self._prefix()), self._prefix_offset, self._read_offset
        new = text[length:]
        self._prefix_offset, self._read_offset = read if new else start, len(self._tokens)
        if self._stops and (stop := self._stop_in(new)) is not None and not self.stopped:
            # While an incomplete character was waited for, an earlier token may have completed the stop.
            ends = range(read + 1, len(self._tokens) + 1)
            texts = (self._decode(self._tokens[start:end])[length:] for end in ends)
            last = next(end for end, part in zip(ends, texts, strict=True) if self._stop_in(part) == stop)
            self.count = last - self._num_context
        return new

    def _stop_in(self, new: str) -> int | None:
        return self._find_stop([*self._pending, *((char, False) for char in new)])

    def _release(self, new: str, special: str = "", *, last: bool) -> str:
        """Give out what cannot be part of a stop, and keep the rest pending."""
        if self.stopped:
            return ""
        pending = [*self._pending, *((char, False) for char in new), *((char, True) for char in special)]
        stop = self._find_stop(pending)
        if stop is not None:
            self.stopped, self._pending = True, []
            return _visible(pending[:stop])
        keep = 0
        if not last and self._stops:
            raw, visible = "".join(char for char, _ in pending), _visible(pending)
            keep = max(_overlap(raw, stop_text) for stop_text in self._stops)
            if overlap := max(_overlap(visible, stop_text) for stop_text in self._stops):
                keep = max(keep, len(pending) - _visible_indices(pending)[-overlap])
        self._pending = pending[len(pending) - keep :]
        return _visible(pending[: len(pending) - keep])

    def _find_stop(self, pending: Sequence[tuple[str, bool]]) -> int | None:
        """Index of the first stop, in the text with special tokens or without them."""
        raw, visible, indices = "".join(char for char, _ in pending), _visible(pending), _visible_indices(pending)
        starts = [start for stop in self._stops if (start := raw.find(stop)) >= 0]
        starts += [indices[start] for stop in self._stops if (start := visible.find(stop)) >= 0]
        return min(starts, default=None)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _visible(pending: Sequence[tuple[str, bool]]) -> str:
    return "".join(char for char, is_special in pending if not is_special)


def _visible_indices(pending: Sequence[tuple[str, bool]]) -> list[int]:
    return [index for index, (_, is_special) in enumerate(pending) if not is_special]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
