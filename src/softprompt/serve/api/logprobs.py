"""Log-probabilities as OpenAI's clients read them: tokens by their text, in the format of completions or of chats."""

import codecs
import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

from transformers.convert_slow_tokenizer import bytes_to_unicode

from softprompt.models.sampling import special_ids
from softprompt.serve.engine.logits import TokenLogprob

_LEAST = -9999.0
"""OpenAI's value for a token whose probability is 0, since JSON has no infinity."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@final
class TokenNames:
    """The text and bytes of single tokens, which joined give the text that was tokenized."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def is_special(self, token: int) -> bool:
        """Whether the token is not part of a text."""
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; a special token's are those of its name."""
        content = self._bytes.get(token)
        if content is None:
            content = self._bytes[token] = self._compute_bytes(token)
        return content

    def _compute_bytes(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an embedding without a token
            return b""
        if self.is_special(token):
            return piece.encode()
        if self._byte_of_character and all(character in self._byte_of_character for character in piece):
            return bytes(self._byte_of_character[character] for character in piece)
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        # After itself, since some tokenizers strip a text's first space.
        return self._decode([token, token])[len(self._decode([token])) :].encode()

    def name(self, token: int) -> str:
        """The token's text; `bytes:` and its bytes if it ends or begins within a character, as OpenAI writes it."""
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def strips_first_space(self, token: int) -> bool:
        """Whether a text that starts with the token lacks the token's first space."""
        return self.bytes_of(token).startswith(b" ") and not self._decode([token]).startswith(" ")

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @cached_property
    def _special(self) -> frozenset[int]:
        return special_ids(self._tokenizer)

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """A byte-level vocabulary's alphabet; empty for other vocabularies."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        steps = {} if decoder is None else json.loads(decoder.__getstate__())
        if "ByteLevel" not in (step.get("type") for step in steps.get("decoders", [steps])):
            return {}
        return {character: byte for byte, character in bytes_to_unicode().items()}

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


@final
class CompletionLogprobs:
    """The `logprobs` of completions, for one text; offsets continue from chunk to chunk.

    Args:
        offset: characters before the text.
        continues_text: the text is decoded after another one, so its first space is not stripped.
    """

    def __init__(self, names: TokenNames, offset: int = 0, *, continues_text: bool = False) -> None:
        self._names, self._offset = names, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_first = not continues_text

    def first_token(self, token: int) -> dict[str, list[Any]]:
        """An input's first token, which nothing in the input predicts."""
        return {
            "tokens": [self._names.name(token)],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [self._next_offset(token)],
        }

    def tokens(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The next tokens."""
        return {
            "tokens": [self._names.name(entry.token) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [self._next_offset(entry.token) for entry in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """By name; the token itself comes last unless it is among them. Of equal names the likeliest counts."""
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            top.setdefault(self._names.name(token), _finite(logprob))
        return top

    def _next_offset(self, token: int) -> int:
        """Where in the text the token's characters start; special tokens have none."""
        if self._names.is_special(token):
            return self._offset
        content, (incomplete, _) = self._names.bytes_of(token), self._decoder.getstate()
        if incomplete and not 0x80 <= next(iter(content), 0x80) < 0xC0:  # not the next byte of that character
            self._offset += len(self._decoder.decode(b"", final=True))
        offset = self._offset
        self._offset += len(self._decoder.decode(content))
        if self._is_first and self._names.strips_first_space(token):
            self._offset -= 1
        self._is_first = False
        return offset


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of chat completions."""

    def item(token: int, logprob: float) -> dict[str, Any]:
        content = None if names.is_special(token) else list(names.bytes_of(token))
        return {"token": names.name(token), "logprob": _finite(logprob), "bytes": content}

    content = [
        {**item(entry.token, entry.logprob), "top_logprobs": [item(*top) for top in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def concatenate(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Completions' `logprobs` of consecutive texts as one."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
