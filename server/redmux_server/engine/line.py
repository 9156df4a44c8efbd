"""Line: who of a tenant waits, and in which order."""

from collections import deque
from collections.abc import Iterator

from redmux_server.engine.request import Request


class Line:
    """The waiting requests of one tenant: of the lowest priority first, then first come first."""

    def __init__(self) -> None:
        self._queues: dict[int, deque[Request]] = {}  # by priority, none empty

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Request]:
        for priority in sorted(self._queues):
            yield from self._queues[priority]

    @property
    def first(self) -> Request:
        """Whose turn it is."""
        return self._queues[min(self._queues)][0]

    def append(self, request: Request) -> None:
        """Puts a request behind the others of its priority."""
        self._queues.setdefault(request.priority, deque()).append(request)

    def append_first(self, request: Request) -> None:
        """Puts a request in front of the others of its priority."""
        self._queues.setdefault(request.priority, deque()).appendleft(request)

    def remove(self, request: Request) -> None:
        """Takes a request out."""
        self._queues[request.priority].remove(request)
        if not self._queues[request.priority]:
            del self._queues[request.priority]
