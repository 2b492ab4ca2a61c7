"""Control tokens: tokens in the template's text, plain text in what comes from a row."""

import json
import secrets
import unicodedata
import weakref
from collections.abc import Sequence
from typing import Any, final

from tokenizers import Tokenizer as Backend

Tokenizer = Any
"""A fast `transformers` tokenizer: one with character offsets for tokens."""
Part = tuple[bool, str]
"""A part of a rendered template: whether it comes from the row, and its text."""
Span = tuple[int, int]
"""The start and end of a token in the text."""


@final
class ControlTokens:
    """A tokenizer's control tokens, and an encoding in which a row's text cannot produce any.

    A control token is a special token, or an added one in brackets (`<think>`, `[INST]`). Other added tokens (runs of
    spaces, domain words) are vocabulary, and are tokens wherever they occur. A text whose fields contain no control
    token is encoded by the tokenizer itself. For any other, each control token gets a secret name in a copy of the
    tokenizer and in the template's text: the text is still encoded in one piece, and no text of a row matches a name.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = {int(index): str(token.content) for index, token in tokenizer.added_tokens_decoder.items()}
        added = tokenizer.added_tokens_decoder.items()
        self.names = {int(index): token.content for index, token in added if _is_control(token)}
        self._tokenizer = weakref.proxy(tokenizer)
        self._kind = type(tokenizer).__name__
        self._unknown = tokenizer.unk_token_id
        self._unknown_name = names.get(self._unknown, "")
        # The unknown token proves nothing: characters outside the vocabulary become it too.
        self._unambiguous = frozenset(self.names) - {self._unknown}
        nonce = f"{secrets.randbits(64):020d}"
        self._secrets = {index: f"{nonce}{index:08d}" for index in self.names}
        self._renamed: Backend | None = None

    def suspects(self, ids: Sequence[int], text: str) -> bool:
        """Whether `ids` may contain a control token from a row's text; `ids` are those without the tokenizer's own."""
        return not self._unambiguous.isdisjoint(ids) or bool(self._unknown_name and self._unknown_name in text)

    def foreign(self, ids: Sequence[int], special: Sequence[int], spans: Sequence[Span], parts: Sequence[Part]) -> bool:
        """Whether a control token comes from anywhere but a literal part of the template."""
        text, literals, start = "".join(part for _, part in parts), [], 0
        for is_field, part in parts:
            if not is_field:
                literals.append((start, start + len(part)))
            start += len(part)
        return any(
            not any(first <= begin and end <= last for first, last in literals)
            for token, is_special, (begin, end) in zip(ids, special, spans, strict=True)
            if not is_special and (token in self._unambiguous or self._is_written_unknown(token, text[begin:end]))
        )

    def literal(self, text: str) -> str:
        """The template's text, its control tokens replaced by their secret names."""
        encoding = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        pieces, end = [], 0
        for token, (begin, last) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._unambiguous or self._is_written_unknown(token, text[begin:last]):
                pieces += [text[end:begin], self._secrets[token]]
                end = last
        return "".join((*pieces, text[end:]))

    def encode(
        self, parts: Sequence[Part], *, special: bool, where: str = "the text"
    ) -> tuple[list[int], list[int], list[Span], list[Part]]:
        """Token ids, the mask of special tokens around the text, spans, and the parts that the spans refer to.

        Args:
            special: add the tokenizer's special tokens around the text.
            where: names the text in an error.

        Raises:
            ValueError: the tokenizer turns a row's text into a control token even so.
        """
        backend = self._backend()
        renamed = [(is_field, part if is_field else self.literal(part)) for is_field, part in parts]
        encoding = backend.encode("".join(part for _, part in renamed), add_special_tokens=special)
        # Here an unknown token always stands for characters outside the vocabulary, even if they spell its name.
        known = [-1 if token == self._unknown else token for token in encoding.ids]
        if self.foreign(known, encoding.special_tokens_mask, encoding.offsets, renamed):
            raise ValueError(self._error(parts, where))
        return list(encoding.ids), list(encoding.special_tokens_mask), list(encoding.offsets), renamed

    def _is_written_unknown(self, token: int, text: str) -> bool:
        return token == self._unknown and token in self.names and text.strip() == self._unknown_name

    def _error(self, parts: Sequence[Part], where: str) -> str:
        fields = "".join(part for is_field, part in parts if is_field)
        token = next((name for name in self.names.values() if name in fields), "a control token")
        return (
            f"{where} holds {token!r}, a control token that {self._kind} cannot read as text; leave it out of the text"
        )

    def _backend(self) -> Backend:
        """A copy of the tokenizer in which control tokens have secret names."""
        if self._renamed is None:
            settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
            settings["truncation"] = settings["padding"] = None
            secrets_by_name = {name: self._secrets[index] for index, name in self.names.items()}
            for token in settings["added_tokens"]:
                token["content"] = secrets_by_name.get(token["content"], token["content"])
            _rename(settings["model"], secrets_by_name)
            renamed = Backend.from_str(json.dumps(settings))
            for index, name in self._secrets.items():
                if renamed.token_to_id(name) != index:
                    raise ValueError(
                        f"{self._kind} cannot read {self.names[index]!r} as text; leave it out of the text"
                    )
            self._renamed = renamed
        return self._renamed


_cache: "weakref.WeakKeyDictionary[Tokenizer, tuple[Any, ControlTokens]]" = weakref.WeakKeyDictionary()


def control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    """The tokenizer's control tokens; cached until tokens are added to it."""
    version = (len(tokenizer), tuple(tokenizer.all_special_ids))
    cached = _cache.get(tokenizer)
    if cached is None or cached[0] != version:
        cached = _cache[tokenizer] = (version, ControlTokens(tokenizer))
    return cached[1]


def _is_control(token: Any) -> bool:
    """Whether an added token is a control token; one character is not, even if special (some models pad with `!`)."""
    name = token.content.strip()
    if len(name) < 2:
        return False
    opens = name[0] == "<" or unicodedata.category(name[0]) in ("Ps", "Pi")
    closes = name[-1] == ">" or unicodedata.category(name[-1]) in ("Pe", "Pf")
    return bool(token.special or (opens and closes))


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename pieces of a tokenizer's vocabulary, so that no text can spell them."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & names.keys()]
