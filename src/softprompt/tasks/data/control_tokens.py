"""Control tokens: in a template's own text they are tokens, in a row's text they are text."""

import json
import secrets
import unicodedata
import weakref
from collections.abc import Sequence
from typing import Any, final

from tokenizers import Tokenizer as Backend

Tokenizer = Any
"""A fast `transformers` tokenizer: one that knows each token's place in the text."""
Part = tuple[bool, str]
"""A piece of a rendered template: whether it comes from the row, and its text."""
Span = tuple[int, int]
"""Where a token's text begins and ends."""


@final
class ControlTokens:
    """A tokenizer's control tokens, and the encoding of texts in which a row must not write any.

    A control token is a special token, or an added one in brackets (`<think>`, `[INST]`). Other added tokens (runs of
    spaces, words of a field) are vocabulary, and stay tokens wherever they are. A text whose fields hold no control
    token is encoded by the tokenizer itself. For any other, each control token gets a secret name in a copy of the
    tokenizer and in the template's own text: the text is still encoded as one, and what a row holds matches nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {int(index): str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
        added = tokenizer.added_tokens_decoder.items()
        self.names = {int(index): token.content for index, token in added if _is_control(token)}
        self._tokenizer = weakref.proxy(tokenizer)
        self._kind = type(tokenizer).__name__
        self._unknown = tokenizer.unk_token_id
        self._unknown_name = names.get(self._unknown, "")
        # Characters that the vocabulary lacks become the unknown token too, which says nothing of the text.
        self._telling = frozenset(self.names) - {self._unknown}
        nonce = f"{secrets.randbits(64):020d}"
        self._secrets = {index: f"{nonce}{index:08d}" for index in self.names}
        self._renamed: Backend | None = None

    def suspects(self, ids: Sequence[int], text: str) -> bool:
        """Whether a row's text may have become a control token: there is one that the tokenizer did not put in."""
        return not self._telling.isdisjoint(ids) or bool(self._unknown_name and self._unknown_name in text)

    def foreign(self, ids: Sequence[int], special: Sequence[int], spans: Sequence[Span], parts: Sequence[Part]) -> bool:
        """Whether a control token's text lies anywhere else than within one literal part of the template."""
        text, literals, start = "".join(part for _, part in parts), [], 0
        for is_field, part in parts:
            if not is_field:
                literals.append((start, start + len(part)))
            start += len(part)
        return any(
            not any(first <= begin and end <= last for first, last in literals)
            for token, is_special, (begin, end) in zip(ids, special, spans, strict=True)
            if not is_special and (token in self._telling or self._is_written_unknown(token, text[begin:end]))
        )

    def literal(self, text: str) -> str:
        """A template's own text, its control tokens under their secret names."""
        made = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        found, end = [], 0
        for token, (begin, last) in zip(made.ids, made.offsets, strict=True):
            if token in self._telling or self._is_written_unknown(token, text[begin:last]):
                found += [text[end:begin], self._secrets[token]]
                end = last
        return "".join((*found, text[end:]))

    def encode(
        self, parts: Sequence[Part], *, special: bool, where: str = "the text"
    ) -> tuple[list[int], list[int], list[Span], list[Part]]:
        """Ids, which of them are special ones around the text, spans, and the parts that the spans are of.

        Args:
            special: let the tokenizer put its special tokens around the text.
            where: names the text in an error.

        Raises:
            ValueError: the tokenizer makes a control token of a row's text all the same.
        """
        backend = self._backend()
        shown = [(is_field, part if is_field else self.literal(part)) for is_field, part in parts]
        made = backend.encode("".join(part for _, part in shown), add_special_tokens=special)
        # An unknown token is what is left of signs that the vocabulary lacks, here even of its own name.
        known = [-1 if token == self._unknown else token for token in made.ids]
        if self.foreign(known, made.special_tokens_mask, made.offsets, shown):
            raise ValueError(self._refusal(parts, where))
        return list(made.ids), list(made.special_tokens_mask), list(made.offsets), shown

    def _is_written_unknown(self, token: int, text: str) -> bool:
        return token == self._unknown and token in self.names and text.strip() == self._unknown_name

    def _refusal(self, parts: Sequence[Part], where: str) -> str:
        fields = "".join(part for is_field, part in parts if is_field)
        held = next((name for name in self.names.values() if name in fields), "a control token")
        return (
            f"{where} holds {held!r}, a control token that {self._kind} cannot read as text; leave it out of the text"
        )

    def _backend(self) -> Backend:
        """The tokenizer's copy in which control tokens have secret names."""
        if self._renamed is None:
            made = json.loads(self._tokenizer.backend_tokenizer.to_str())
            made["truncation"] = made["padding"] = None
            by_name = {name: self._secrets[index] for index, name in self.names.items()}
            for token in made["added_tokens"]:
                token["content"] = by_name.get(token["content"], token["content"])
            _rename(made["model"], by_name)
            renamed = Backend.from_str(json.dumps(made))
            for index, name in self._secrets.items():
                if renamed.token_to_id(name) != index:
                    raise ValueError(
                        f"{self._kind} cannot be told to read {self.names[index]!r} as text; leave it out of the text"
                    )
            self._renamed = renamed
        return self._renamed


_known: "weakref.WeakKeyDictionary[Tokenizer, tuple[Any, ControlTokens]]" = weakref.WeakKeyDictionary()


def control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    """The tokenizer's control tokens, as of now: tokens may have been added to it."""
    version = (len(tokenizer), tuple(tokenizer.all_special_ids))
    found = _known.get(tokenizer)
    if found is None or found[0] != version:
        found = _known[tokenizer] = (version, ControlTokens(tokenizer))
    return found[1]


def _is_control(token: Any) -> bool:
    """A single sign is vocabulary even where it is special (some models pad with `!`)."""
    name = token.content.strip()
    if len(name) < 2:
        return False
    opens = name[0] == "<" or unicodedata.category(name[0]) in ("Ps", "Pi")
    closes = name[-1] == ">" or unicodedata.category(name[-1]) in ("Pe", "Pf")
    return bool(token.special or (opens and closes))


def _rename(model: dict[str, Any], by_name: dict[str, str]) -> None:
    """Other names for pieces of the vocabulary, so that no text spells them out."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {by_name.get(piece, piece): index for piece, index in vocab.items()}
    else:
        model["vocab"] = [[by_name.get(piece, piece), score] for piece, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = by_name.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & by_name.keys()]
