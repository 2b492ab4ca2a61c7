"""The line: bounded, and fair between prompts. Not for several threads at once; the engine's lock guards it."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import final

from softprompt.serve.engine.request import Choice, Full, Ticket, Writing

Kind = type[Choice] | type[Writing]
_WINDOW = 4
"""Rows looked at for each that is taken, when rows of similar length are wanted."""


@final
class Waiting:
    """A line a prompt and kind of work; prompts take turns, so a busy one delays itself and no other.

    Args:
        most: rows that may wait; more are refused.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: dict[Kind, OrderedDict[str, deque[Ticket]]] = {Choice: OrderedDict(), Writing: OrderedDict()}

    def __len__(self) -> int:
        return sum(self.count(kind) for kind in self._lines)

    def count(self, kind: Kind) -> int:
        """Rows of a kind."""
        return sum(map(len, self._lines[kind].values()))

    def by_prompt(self) -> dict[str, int]:
        """Rows of each prompt that has any."""
        found: dict[str, int] = {}
        for lines in self._lines.values():
            for name, line in lines.items():
                found[name] = found.get(name, 0) + len(line)
        return found

    def oldest(self, kind: Kind) -> float | None:
        """When the row came that has waited longest."""
        return min((line[0].arrived for line in self._lines[kind].values()), default=None)

    def put(self, tickets: Sequence[Ticket], seconds_each: float) -> None:
        """Let all of them wait, or none.

        Args:
            seconds_each: what a row takes at present, for the advice when to come back.

        Raises:
            Full: there is no room for all.
        """
        waiting = len(self)
        if waiting + len(tickets) > self._most:
            raise Full(waiting, min(max(1.0, waiting * seconds_each), 60.0))
        for ticket in tickets:
            lines = self._lines[type(ticket.work)]
            lines.setdefault(ticket.served.name, deque()).append(ticket)

    def take(self, kind: Kind, most: int, *, alike: bool = False) -> list[Ticket]:
        """Up to `most` rows, prompt after prompt.

        Args:
            alike: rows as long as the first one before others, which then are next in turn.
        """
        lines = self._lines[kind]
        if not lines or most < 1:
            return []
        picked = self._in_turn(lines, most * _WINDOW if alike else most)
        if alike:
            length = len(picked[0].ids)
            picked = sorted(picked, key=lambda ticket: abs(len(ticket.ids) - length))[:most]
        taken = set(map(id, picked))
        for name in dict.fromkeys(ticket.served.name for ticket in picked):
            rest = deque(ticket for ticket in lines.pop(name) if id(ticket) not in taken)
            if rest:
                lines[name] = rest  # at the end: it had its turn
        return picked

    def drop(self, over: Callable[[Ticket], bool]) -> None:
        """Let those go for whom nothing is left to do."""
        for lines in self._lines.values():
            for name in list(lines):
                rest = deque(ticket for ticket in lines[name] if not over(ticket))
                if rest:
                    lines[name] = rest
                else:
                    del lines[name]

    def everyone(self) -> list[Ticket]:
        """All who wait."""
        return [ticket for lines in self._lines.values() for line in lines.values() for ticket in line]

    @staticmethod
    def _in_turn(lines: OrderedDict[str, deque[Ticket]], most: int) -> list[Ticket]:
        found: list[Ticket] = []
        turns = [iter(line) for line in lines.values()]
        while turns and len(found) < most:
            still = []
            for line in turns:
                if (ticket := next(line, None)) is not None:
                    found.append(ticket)
                    still.append(line)
                    if len(found) == most:
                        break
            turns = still
        return found
