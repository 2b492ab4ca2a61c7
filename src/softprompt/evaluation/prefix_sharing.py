"""Which texts share a beginning, so that it is read once for all of them.

A template's instruction stands in front of every row, and a passage in front of each question about it: with a causal
model what is made of them is the same each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

Tokens = tuple[int, ...]
Group = tuple[int, list[int]]
"""How many tokens texts share, and which texts."""

MIN_SAVING = 200
"""Tokens that must be saved to pay for a pass of its own; on a CPU a pass of few tokens costs as one of a hundred."""
MOST = 8192
"""Tokens of beginnings, padded, whose keys and values are held at a time, so that memory stays that of a batch."""


@final
@dataclass(frozen=True)
class PrefixGroup:
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
    return shared if len(shared) * (len(texts) - 1) >= MIN_SAVING else ()


def plan_prefix_groups(texts: Sequence[Tokens], batch: int, *, share: bool = True) -> list[PrefixGroup]:
    """All texts, once each: those that share a beginning where that pays, and the others by length, `batch` at a time.

    A reading has at most `batch` texts, or all those of one beginning.

    Args:
        share: read beginnings once; else every text is read whole.
    """
    groups = _groups(texts) if share else []
    grouped = {text for _, members in groups for text in members}
    alone = [text for text in range(len(texts)) if text not in grouped]
    found = []
    groups.sort(key=lambda group: group[0])
    while groups:
        longest, members = groups.pop()
        taken, rows = [(longest, members)], len(members)
        # Beginnings run side by side, padded to the longest.
        while groups and 2 * groups[-1][0] >= longest and (len(taken) + 1) * longest <= MOST:
            if rows + len(groups[-1][1]) > batch:
                break
            taken.append(groups.pop())
            rows += len(taken[-1][1])
        if sum(_saving(*group) for group in taken) < MIN_SAVING:
            alone += [text for _, members in taken for text in members]
            continue
        placed = [(text, which) for which, (_, members) in enumerate(taken) for text in members]
        placed.sort(key=lambda one: len(texts[one[0]]) - taken[one[1]][0])
        found.append(PrefixGroup(tuple(texts[members[0]][:length] for length, members in taken), tuple(placed)))
    alone.sort(key=lambda text: len(texts[text]))
    found += [
        PrefixGroup(((),), tuple((text, 0) for text in alone[start : start + batch]))
        for start in range(0, len(alone), batch)
    ]
    return found


def _groups(texts: Sequence[Tokens]) -> list[Group]:
    """Disjoint groups of two texts or more that begin alike, of which together the most tokens are read but once.

    Texts in alphabetical order are the leaves of a tree, and those below a branch share as many tokens as it is deep.
    Each branch is one group, or what its branches are, whichever saves more. A text is left one token at least.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    branches: list[_Branch] = []
    for place, text in enumerate(order):
        done = _Branch(0, place)
        after = order[place + 1] if place + 1 < len(order) else None
        depth = 0 if after is None else len(_shared(texts[text][:-1], texts[after][:-1]))
        while branches and branches[-1].depth > depth:
            branches[-1].absorb(done)
            done = branches.pop()
            done.settle(order[done.start : place + 1])
        if not branches or branches[-1].depth < depth:
            branches.append(_Branch(depth, done.start))
        branches[-1].absorb(done)
    return branches[0].groups if branches else []


class _Branch:
    """Neighbouring texts from the place `start` on that share `depth` tokens, and the best groups among them so far."""

    def __init__(self, depth: int, start: int) -> None:
        self.depth, self.start = depth, start
        self.saving, self.groups = 0, list[Group]()

    def absorb(self, part: "_Branch") -> None:
        """Texts that come next."""
        self.saving += part.saving
        self.groups += part.groups

    def settle(self, members: list[int]) -> None:
        """All `members` are one group where that saves more."""
        if (whole := _saving(self.depth, members)) > self.saving:
            self.saving, self.groups = whole, [(self.depth, members)]


def _saving(length: int, members: Sequence[int]) -> int:
    return length * (len(members) - 1)


def _shared(one: Tokens, other: Tokens) -> Tokens:
    length = 0
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        length += 1
    return one[:length]
