"""FairThread: one thread for what may take long, fair over tenants and in nobody's way."""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from redmux.errors import UnavailableError

T = TypeVar("T")

_PORTION_CHARS = 1 << 15
_SOME = 64


class _Job(NamedTuple):
    work: Callable[[], Any]
    cost: int
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]


class FairThread:
    """Runs pieces of work one after the other, the least served tenant's first.

    A tenant that had nothing waiting starts level with the one served last, so neither it nor those
    that wait are passed over for long, however many tenants come. Nothing waits for the thread when
    the process ends.
    """

    def __init__(self, name: str) -> None:
        self._wakes = threading.Condition()
        # Below: whoever holds the condition.
        self._waiting: dict[str, deque[_Job]] = {}
        self._served: dict[str, int] = {}  # tenant -> cost of what was begun for it
        self._level = 0  # that of the tenant served last
        self._now: _Job | None = None
        self._is_closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    async def run(self, tenant: str, cost: int, work: Callable[[], T]) -> T:
        """Returns what `work` returns in the thread, or raises what it raises.

        `cost` is about what it takes, in any one unit. Raises UnavailableError once the thread is
        closed, be it while the work waits or goes on.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        with self._wakes:
            if self._is_closed:
                raise _closed()
            if tenant not in self._waiting:
                self._served[tenant] = max(self._served.get(tenant, 0), self._level)
                self._waiting[tenant] = deque()
            self._waiting[tenant].append(_Job(work, cost, loop, done))
            self._wakes.notify()
        return await done

    def close(self) -> None:
        """Fails what waits and what goes on; what goes on is left to itself."""
        with self._wakes:
            self._is_closed = True
            left = [job for queue in self._waiting.values() for job in queue]
            if self._now is not None:
                left.append(self._now)
            self._waiting.clear()
            self._wakes.notify()
        for job in left:
            _settle(job, error=_closed())

    def _run(self) -> None:
        while (job := self._next()) is not None:
            result, error = None, None
            if not job.done.cancelled():
                try:
                    result = job.work()
                except Exception as err:  # the caller's to tell
                    error = err
            with self._wakes:
                self._now = None
            _settle(job, result, error)

    def _next(self) -> _Job | None:
        """Waits for the next piece of work; None once the thread is closed."""
        with self._wakes:
            while not self._waiting and not self._is_closed:
                self._wakes.wait()
            if self._is_closed:
                return None
            tenant = min(self._waiting, key=self._served.__getitem__)
            queue = self._waiting[tenant]
            self._now = queue.popleft()
            self._served[tenant] += max(1, self._now.cost)
            self._level = self._served[tenant]
            if not queue:
                del self._waiting[tenant]
            if len(self._served) > 2 * len(self._waiting) + _SOME:
                self._forget_idle_tenants()
            return self._now

    def _forget_idle_tenants(self) -> None:
        """Forgets the counters that make no difference when their tenant comes back."""
        self._served = {
            tenant: served
            for tenant, served in self._served.items()
            if tenant in self._waiting or served > self._level
        }


def _settle(job: _Job, result: Any = None, error: Exception | None = None) -> None:
    def settle() -> None:
        if job.done.done():  # cancelled, or closed
            return
        if error is None:
            job.done.set_result(result)
        else:
            job.done.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        job.loop.call_soon_threadsafe(settle)


def _closed() -> UnavailableError:
    return UnavailableError("the server is shutting down")


def portions(items: Iterable[T], chars_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Yields texts in lists of few characters or one text, to be encoded in one turn each."""
    portion: list[T] = []
    total = 0
    for item in items:
        chars = chars_of(item)
        if portion and total + chars > _PORTION_CHARS:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += chars
    if portion:
        yield portion
