"""The queue of requests: bounded, and fair between prompts. Not thread-safe; the scheduler's lock guards it."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import final

from softprompt.serve.engine.request import ClassifyParams, EngineRequest, GenerateParams, QueueFull, RequestKind

_LOOKAHEAD = 4
"""Rows looked at for each row taken, when rows of similar length are preferred."""


@final
class RequestQueue:
    """A FIFO per prompt and kind of request, taken round-robin: what a busy prompt has in the queue delays only itself.

    Args:
        max_size: rows in the queue; more are refused.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._queues: dict[RequestKind, OrderedDict[str, deque[EngineRequest]]] = {
            ClassifyParams: OrderedDict(),
            GenerateParams: OrderedDict(),
        }

    def __len__(self) -> int:
        return sum(map(self.count, self._queues))

    def __iter__(self) -> Iterator[EngineRequest]:
        for queues in self._queues.values():
            yield from chain.from_iterable(queues.values())

    def count(self, kind: RequestKind) -> int:
        """Rows of one kind."""
        return sum(map(len, self._queues[kind].values()))

    def count_by_prompt(self) -> dict[str, int]:
        """Rows of each prompt that has any."""
        return dict(Counter(request.entry.name for request in self))

    def oldest_arrival(self, kind: RequestKind) -> float | None:
        """Arrival time (monotonic) of the request of this kind that has been queued longest."""
        return min((queue[0].arrived for queue in self._queues[kind].values()), default=None)

    def put(self, requests: Sequence[EngineRequest], seconds_per_row: Mapping[RequestKind, float]) -> None:
        """Queue all of the requests, or none.

        Args:
            seconds_per_row: recent time per row of each kind, from which the error's `retry_after` is estimated.

        Raises:
            QueueFull: there is no room for all of them now.
            ValueError: there never is.
        """
        if len(requests) > self._max_size:
            raise ValueError(
                f"{len(requests)} rows were sent, and the queue holds {self._max_size}; send fewer at once"
            )
        queued = len(self)
        if queued + len(requests) > self._max_size:
            seconds = sum(self.count(kind) * seconds_per_row[kind] for kind in self._queues)
            raise QueueFull(queued, min(max(1.0, seconds), 60.0))
        for request in requests:
            self._queues[type(request.params)].setdefault(request.entry.name, deque()).append(request)

    def take(self, kind: RequestKind, limit: int, *, similar_length: bool = False) -> list[EngineRequest]:
        """Remove and return up to `limit` rows, round-robin over prompts.

        Args:
            similar_length: prefer rows as long as the first one; those passed over come next.
        """
        queues = self._queues[kind]
        if not queues or limit < 1:
            return []
        rounds = zip_longest(*queues.values())
        round_robin = (request for requests in rounds for request in requests if request is not None)
        picked = list(islice(round_robin, limit * _LOOKAHEAD if similar_length else limit))
        if similar_length:
            length = len(picked[0].ids)
            picked = sorted(picked, key=lambda request: abs(len(request.ids) - length))[:limit]
        taken = set(map(id, picked))
        for name in dict.fromkeys(request.entry.name for request in picked):
            rest = deque(request for request in queues.pop(name) if id(request) not in taken)
            if rest:
                queues[name] = rest  # at the end: it had its turn
        return picked

    def drop_done(self) -> None:
        """Remove requests that have a result or an error already."""
        for queues in self._queues.values():
            for name in list(queues):
                rest = deque(request for request in queues[name] if not request.done)
                if rest:
                    queues[name] = rest
                else:
                    del queues[name]
