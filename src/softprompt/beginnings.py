"""Which texts share a beginning, so that it is read once for all of them.

A template's instruction stands in front of every row, and a passage in front of each question about it: with a causal
model what is made of them is the same each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

Tokens = tuple[int, ...]

WORTH = 200
"""Tokens that must be saved to pay for a pass of its own; on a CPU a pass of few tokens costs as one of a hundred."""
MOST = 4096
"""Tokens of beginnings whose keys and values are held at a time, so that memory stays that of a batch."""


@final
@dataclass(frozen=True)
class Reading:
    """Texts that go together."""

    beginnings: tuple[Tokens, ...]
    """Read once; an empty one alone: the texts are read whole."""
    texts: tuple[tuple[int, int], ...]
    """Which text, and which beginning it has."""


def common(texts: Sequence[Tokens]) -> Tokens:
    """What all begin with, if reading it apart pays; each is left one token at least."""
    if not texts:
        return ()
    shared = _shared(min(texts), max(texts))[: min(map(len, texts)) - 1]
    return shared if len(shared) * (len(texts) - 1) >= WORTH else ()


def readings(texts: Sequence[Tokens], batch: int, *, apart: bool = False) -> list[Reading]:
    """All texts, once each: those that share a beginning where that pays, and the others by length, `batch` at a time.

    A reading with beginnings has `batch` texts or a few more; one with a beginning of many texts has them all.

    Args:
        apart: share nothing.
    """
    found, alone = list[Reading](), list[int]()
    groups = []
    for beginning, members in _groups(texts) if not apart else [((), [text]) for text in range(len(texts))]:
        if len(members) > 1:
            groups.append((beginning, members))
        else:
            alone += members
    groups.sort(key=lambda group: len(group[0]))
    while groups:
        taken, rows, held = list[tuple[Tokens, list[int]]](), 0, 0
        while groups and rows < batch and (not taken or held + len(groups[-1][0]) <= MOST):
            taken.append(groups.pop())
            rows += len(taken[-1][1])
            held += len(taken[-1][0])
        if sum(len(beginning) * (len(members) - 1) for beginning, members in taken) < WORTH:
            alone += [text for _, members in taken for text in members]
            continue
        placed = [(text, which) for which, (_, members) in enumerate(taken) for text in members]
        placed.sort(key=lambda one: len(texts[one[0]]) - len(taken[one[1]][0]))
        found.append(Reading(tuple(beginning for beginning, _ in taken), tuple(placed)))
    alone.sort(key=lambda text: len(texts[text]))
    found += [
        Reading(((),), tuple((text, 0) for text in alone[start : start + batch]))
        for start in range(0, len(alone), batch)
    ]
    return found


def _groups(texts: Sequence[Tokens]) -> list[tuple[Tokens, list[int]]]:
    """Texts that begin alike, with what they begin with; each is left one token at least.

    In alphabetical order a text shares most with its neighbours. It joins those before it where all together are then
    fewer tokens than with it apart.
    """
    found: list[tuple[Tokens, list[int]]] = []
    for text in sorted(range(len(texts)), key=texts.__getitem__):
        whole = texts[text]
        if found:
            beginning, members = found[-1]
            shared = _shared(beginning, whole[:-1])
            if len(shared) > (len(members) - 1) * (len(beginning) - len(shared)):
                found[-1] = shared, [*members, text]
                continue
        found.append((whole[:-1], [text]))
    return found


def _shared(one: Tokens, other: Tokens) -> Tokens:
    length = 0
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        length += 1
    return one[:length]
