"""A template's syntax, and how a cell becomes text."""

import functools
import math
import re
from typing import Any

import numpy as np


@functools.lru_cache
def parse(template: str) -> tuple[tuple[bool, str], ...]:
    """A template's parts in order: `(True, column)` and `(False, text)`.

    Unlike `str.format` a field is a column's name and nothing else: `{a.b}` would read attributes, `{a!r}` and
    `{a:>9}` would change the text.

    Raises:
        ValueError: a single brace, an empty field, or a field with `.`, `[`, `]`, `!` or `:` in it.

    >>> parse("{{{a}}} b")
    ((False, '{'), (True, 'a'), (False, '} b'))
    """
    parts: list[tuple[bool, str]] = []
    for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", template):
        if token in ("{", "}"):
            raise ValueError(
                f"the template {template!r} has a single {token!r}; write it twice to mean the sign itself"
            )
        if is_field := token[0] == "{" and token != "{{":
            token = token[1:-1]
            if not token.strip() or (wrong := re.search(r"[.\[\]!:]", token)):
                reason = f"{wrong.group()!r} in it" if token.strip() and wrong else "nothing in it"
                raise ValueError(
                    f"the template {template!r} has the field {'{' + token + '}'} with {reason}; "
                    "a field is the name of a column and nothing else"
                )
        elif token in ("{{", "}}"):
            token = token[0]
        if parts and not is_field and not parts[-1][0]:
            parts[-1] = (False, parts[-1][1] + token)
        else:
            parts.append((is_field, token))
    return tuple(parts)


def value_text(value: Any, column: str, where: str) -> str:
    """A cell as text; a boolean as JSON writes it.

    Raises:
        ValueError: the cell is missing, or is no text, number or boolean.
    """
    if isinstance(value, np.generic):
        value = value.item()
    # Of pandas, by name: it need not be there.
    is_gap = value is None or type(value).__name__ in ("NAType", "NaTType")
    if is_gap or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{where} has no value in column {column!r}; give it one or leave the row out")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"{where} has a {type(value).__name__} in column {column!r}; text or a number belongs there")
    whole_characters(value, column, where)
    return str(value)


def whole_characters(value: Any, column: str, where: str) -> None:
    r"""Refuse half a character in a cell, or in a list of them: JSON can write one (`\ud83d`), UTF-8 and models cannot.

    Raises:
        ValueError: naming it.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
            raise ValueError(
                f"{where} has half a character (\\u{ord(half.group()):x}, one of a surrogate pair) in column "
                f"{column!r}; write the whole character or take it out"
            )
