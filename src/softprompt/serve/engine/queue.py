"""The line: bounded, and fair between prompts. Not for several threads at once; the engine's lock guards it."""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import final

from softprompt.serve.engine.request import ClassifyParams, EngineRequest, GenerateParams, QueueFull

Kind = type[ClassifyParams] | type[GenerateParams]
_WINDOW = 4
"""Rows looked at for each that is taken, when rows of similar length are wanted."""


@final
class RequestQueue:
    """A line a prompt and kind of work; prompts take turns, so a busy one delays itself and no other.

    Args:
        most: rows that may wait; more are refused.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lines: dict[Kind, OrderedDict[str, deque[EngineRequest]]] = {
            ClassifyParams: OrderedDict(),
            GenerateParams: OrderedDict(),
        }

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

    def put(self, requests: Sequence[EngineRequest], seconds_each: float) -> None:
        """Let all of them wait, or none.

        Args:
            seconds_each: what a row takes at present, for the advice when to come back.

        Raises:
            Full: there is no room for all.
        """
        waiting = len(self)
        if waiting + len(requests) > self._most:
            raise QueueFull(waiting, min(max(1.0, waiting * seconds_each), 60.0))
        for request in requests:
            lines = self._lines[type(request.work)]
            lines.setdefault(request.served.name, deque()).append(request)

    def take(self, kind: Kind, most: int, *, alike: bool = False) -> list[EngineRequest]:
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
            picked = sorted(picked, key=lambda request: abs(len(request.ids) - length))[:most]
        taken = set(map(id, picked))
        for name in dict.fromkeys(request.served.name for request in picked):
            rest = deque(request for request in lines.pop(name) if id(request) not in taken)
            if rest:
                lines[name] = rest  # at the end: it had its turn
        return picked

    def drop(self, over: Callable[[EngineRequest], bool]) -> None:
        """Let those go for whom nothing is left to do."""
        for lines in self._lines.values():
            for name in list(lines):
                rest = deque(request for request in lines[name] if not over(request))
                if rest:
                    lines[name] = rest
                else:
                    del lines[name]

    def everyone(self) -> list[EngineRequest]:
        """All who wait."""
        return [request for lines in self._lines.values() for line in lines.values() for request in line]

    @staticmethod
    def _in_turn(lines: OrderedDict[str, deque[EngineRequest]], most: int) -> list[EngineRequest]:
        found: list[EngineRequest] = []
        turns = [iter(line) for line in lines.values()]
        while turns and len(found) < most:
            still = []
            for line in turns:
                if (request := next(line, None)) is not None:
                    found.append(request)
                    still.append(line)
                    if len(found) == most:
                        break
            turns = still
        return found
