"""Prefix sharing: which texts have a common prefix, so that its keys and values are computed once for all of them.

A template's instruction precedes every row, and a passage precedes each question about it; in a causal model their keys
and values are the same each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

Tokens = tuple[int, ...]
SharedPrefix = tuple[int, list[int]]
"""The length of a prefix, and the indices of the texts that share it."""

MIN_SAVING = 200
"""Tokens that a prefix must save to be worth its own forward pass: on a CPU, a pass of few tokens costs as much as one
of a hundred."""
MAX_PREFIX_TOKENS = 8192
"""Padded prefix tokens whose keys and values are kept at a time, which bounds memory to about that of a batch."""


@final
@dataclass(frozen=True)
class PrefixGroup:
    """Texts that are run together, with the prefixes that they share."""

    prefixes: tuple[Tokens, ...]
    """The shared prefixes; a single empty one if the texts share none."""
    texts: tuple[tuple[int, int], ...]
    """For each text, its index among all texts and the index of its prefix."""


def shared_prefix(texts: Sequence[Tokens]) -> Tokens:
    """The prefix that all texts share, or `()` if it saves fewer than `MIN_SAVING` tokens.

    It leaves each text at least one token.
    """
    if not texts:
        return ()
    prefix = _common_prefix(min(texts), max(texts))[: min(map(len, texts)) - 1]
    return prefix if _saving(len(prefix), len(texts)) >= MIN_SAVING else ()


def plan_prefix_groups(texts: Sequence[Tokens], batch: int, *, share: bool = True) -> list[PrefixGroup]:
    """Divide texts into groups: those that share a prefix of at least `MIN_SAVING`, and the others sorted by length.

    Each text is in exactly one group. A group has at most `batch` texts, or all the texts of one prefix.

    Args:
        share: whether texts may share prefixes.
    """
    shared = _shared_prefixes(texts) if share else []
    in_shared = {row for _, members in shared for row in members}
    without_prefix = [row for row in range(len(texts)) if row not in in_shared]
    groups = []
    shared.sort(key=lambda prefix: prefix[0])
    while shared:
        longest, members = shared.pop()
        batched, rows = [(longest, members)], len(members)
        # The prefixes of a group are one batch, padded to the longest.
        while shared and 2 * shared[-1][0] >= longest and (len(batched) + 1) * longest <= MAX_PREFIX_TOKENS:
            if rows + len(shared[-1][1]) > batch:
                break
            batched.append(shared.pop())
            rows += len(batched[-1][1])
        if sum(_saving(length, len(members)) for length, members in batched) < MIN_SAVING:
            without_prefix += [row for _, members in batched for row in members]
            continue
        prefixes = tuple(texts[members[0]][:length] for length, members in batched)
        indices = [(row, prefix) for prefix, (_, members) in enumerate(batched) for row in members]
        indices.sort(key=lambda index: len(texts[index[0]]) - len(prefixes[index[1]]))
        groups.append(PrefixGroup(prefixes, tuple(indices)))
    without_prefix.sort(key=lambda row: len(texts[row]))
    groups += [
        PrefixGroup(((),), tuple((row, 0) for row in without_prefix[start : start + batch]))
        for start in range(0, len(without_prefix), batch)
    ]
    return groups


def _shared_prefixes(texts: Sequence[Tokens]) -> list[SharedPrefix]:
    """Disjoint groups of two or more texts with a common prefix that together save the most tokens.

    Sorted texts are the leaves of a prefix tree, and the texts below a branch share as many tokens as the branch is
    long. A branch becomes one group, or the groups of its sub-branches, whichever saves more. Each text keeps at least
    one token.
    """
    order = sorted(range(len(texts)), key=texts.__getitem__)
    branches: list[_Branch] = []
    for position, row in enumerate(order):
        branch = _Branch(0, position)
        following = order[position + 1] if position + 1 < len(order) else None
        length = 0 if following is None else len(_common_prefix(texts[row][:-1], texts[following][:-1]))
        while branches and branches[-1].length > length:
            branches[-1].add(branch)
            branch = branches.pop()
            branch.close(order[branch.start : position + 1])
        if not branches or branches[-1].length < length:
            branches.append(_Branch(length, branch.start))
        branches[-1].add(branch)
    return branches[0].groups if branches else []


class _Branch:
    """Consecutive sorted texts, from `start` on, that share `length` tokens, and the best groups among them."""

    def __init__(self, length: int, start: int) -> None:
        self.length, self.start = length, start
        self.saving, self.groups = 0, list[SharedPrefix]()

    def add(self, part: "_Branch") -> None:
        """Add a sub-branch, or a text, that comes next."""
        self.saving += part.saving
        self.groups += part.groups

    def close(self, members: list[int]) -> None:
        """Make all `members` one group if that saves more."""
        if (saving := _saving(self.length, len(members))) > self.saving:
            self.saving, self.groups = saving, [(self.length, members)]


def _saving(length: int, texts: int) -> int:
    """The tokens saved by computing a prefix once for this many texts."""
    return length * (texts - 1)


def _common_prefix(left: Tokens, right: Tokens) -> Tokens:
    length = 0
    for left_token, right_token in zip(left, right, strict=False):
        if left_token != right_token:
            break
        length += 1
    return left[:length]
