"""A colour, a marker and a line for each method, the same in every picture and in every report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final, get_args

from softprompt.prompts import METHODS
from softprompt.types import Baseline

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F", "#808080")
"""Okabe and Ito's, which the colour-blind tell apart, without black and yellow, which vanish on one of both grounds."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", "*")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)


@final
@dataclass(frozen=True, kw_only=True)
class Style:
    """How a method looks; each is told from the others by its marker alone too."""

    colour: str
    marker: str


def styles(methods: Iterable[str]) -> dict[str, Style]:
    """Of the library's methods and baselines, always the same, and of others after them by name."""
    # A user's own method must not move the colours of the library's.
    inside = [name for name in sorted(METHODS) if METHODS[name].__module__.startswith("softprompt.")]
    own = [*inside, *(name for name in get_args(Baseline) if name != "none")]
    names = [*own, *sorted(set(methods) - set(own))]
    return {
        name: Style(colour=_COLOURS[place % len(_COLOURS)], marker=_MARKERS[place % len(_MARKERS)])
        for place, name in enumerate(names)
    }


def dash(place: int) -> Any:
    """The line of a method's first, second, ... row."""
    return _DASHES[place % len(_DASHES)]
