"""The syntax of templates, and the conversion of cells to text."""

import functools
import math
import re
from collections.abc import Collection
from typing import Any

import numpy as np


@functools.lru_cache
def parse(template: str) -> tuple[tuple[bool, str], ...]:
    """Split a template into its parts in order: `(True, column)` and `(False, text)`.

    Unlike in `str.format`, everything between braces is a column's name: `{user.name}`, `{a:b}`, `{Customer Text}`.

    Raises:
        ValueError: a single brace, or an empty field.

    >>> parse("{{{a}}} b {c.d[0]}")
    ((False, '{'), (True, 'a'), (False, '} b '), (True, 'c.d[0]'))
    """
    parts: list[tuple[bool, str]] = []
    for token in re.findall(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+", template):
        if token in ("{", "}"):
            raise ValueError(
                f"the template {template!r} has a single {token!r}; write it twice to mean the brace itself"
            )
        if is_field := token[0] == "{" and token != "{{":
            token = token[1:-1]
            if not token.strip():
                raise ValueError(
                    f"the template {template!r} has the field {'{' + token + '}'} with nothing in it; "
                    "write a column's name there"
                )
        elif token in ("{{", "}}"):
            token = token[0]
        if parts and not is_field and not parts[-1][0]:
            parts[-1] = (False, parts[-1][1] + token)
        else:
            parts.append((is_field, token))
    return tuple(parts)


def format_hint(column: str, names: Collection[str]) -> str:
    """The hint for a missing `column` that is the name of another one in the syntax of `str.format`, as `a!r` or `a.b`.

    >>> format_hint("a:>9", ["a", "b"])
    "; braces hold a column's name and nothing else, write {a}"
    """
    name = next((name for name in (re.split(r"[.\[!:]", column)[0], column.strip()) if name in names), None)
    return "" if name is None else f"; braces hold a column's name and nothing else, write {{{name}}}"


def label_texts(value: Any, column: str, where: str) -> tuple[str, ...]:
    """The keys of `label_words` that a label may have: its text, and for a number also its other form (1 and 1.0).

    A column of integers with a missing value is read as floats, so 1.0 may be the label 1. Raises as `value_text`.

    >>> label_texts(1.0, "y", "row 1"), label_texts("1.0", "y", "row 1")
    (('1.0', '1'), ('1.0',))
    """
    text = value_text(value, column, where)
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return (text,)
    other_form = f"{text}.0" if text.lstrip("-").isdigit() else text.removesuffix(".0")
    return (text, other_form) if other_form != text else (text,)


def value_text(value: Any, column: str, where: str) -> str:
    """Convert a cell to text; a boolean as in JSON.

    Raises:
        ValueError: the cell is missing, or is not a text, number or boolean.
    """
    if isinstance(value, np.generic):
        value = value.item()
    # pandas' missing values, by name: pandas need not be installed.
    is_missing = value is None or type(value).__name__ in ("NAType", "NaTType")
    if is_missing or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{where} has no value in column {column!r}; give it one or leave the row out")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"{where} has a {type(value).__name__} in column {column!r}; text or a number belongs there")
    check_characters(value, column, where)
    return str(value)


def check_characters(value: Any, column: str, where: str) -> None:
    r"""Refuse half a surrogate pair in a cell or a list of cells: JSON can encode one (`\ud83d`), UTF-8 cannot.

    Raises:
        ValueError: naming the code point, the column and the row.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii() and (half := re.search("[\ud800-\udfff]", text)):
            raise ValueError(
                f"{where} has half a character (\\u{ord(half.group()):x}, one of a surrogate pair) in column "
                f"{column!r}; write the whole character or take it out"
            )
