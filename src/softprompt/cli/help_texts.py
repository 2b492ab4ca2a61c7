"""Help texts as paragraphs: tyro 1.0 keeps the line breaks of docstrings, wherever they fall in the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import docstring_parser


@contextmanager
def joined_lines() -> Iterator[None]:
    """Give tyro, which reads docstrings through `docstring_parser`, each paragraph of a setting on one line."""
    parsers = {name: getattr(docstring_parser, name) for name in ("parse", "parse_from_object")}
    for name, parse in parsers.items():
        setattr(docstring_parser, name, _joining(parse))
    try:
        yield
    finally:
        for name, parse in parsers.items():
            setattr(docstring_parser, name, parse)


def _joining(parse: Callable[..., docstring_parser.Docstring]) -> Callable[..., docstring_parser.Docstring]:
    def parse_and_join(*args: Any, **kwargs: Any) -> docstring_parser.Docstring:
        docstring = parse(*args, **kwargs)
        for parameter in docstring.params:
            paragraphs = (parameter.description or "").split("\n\n")
            parameter.description = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) or None
        return docstring

    return parse_and_join
