"""Many requests at once, with their answers in the order of what they answer."""

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Mapping,
)
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from redmux._progress import Progress
from redmux.errors import InvalidArgumentError, RedmuxError

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)

CONCURRENCY = 16
# Answers that wait for a slower one before them, and requests under way, are together at most so
# many times the concurrency: that is all of an endless input that is ever held.
_AHEAD = 4


class Pending(Protocol[Answer_co]):
    """A request under way."""

    def result(self) -> Answer_co:
        """Returns the answer, waiting for it; raises RedmuxError."""

    def done(self) -> bool:
        """Whether `result` returns or raises at once."""

    def tell(self, ended: Callable[[], None]) -> None:
        """Calls `ended` once it is done, from any thread."""

    def cancel(self) -> None:
        """Gives it up."""


class _Refused:
    """A request that could not be made."""

    def __init__(self, error: RedmuxError) -> None:
        self._error = error

    def result(self) -> Any:
        raise self._error

    def done(self) -> bool:
        return True

    def tell(self, ended: Callable[[], None]) -> None:
        ended()

    def cancel(self) -> None:
        pass


def check_mapping(prompts: object, concurrency: int, *, is_async: bool = False) -> None:
    """Raises InvalidArgumentError for what cannot be mapped over."""
    if isinstance(prompts, str | bytes | Mapping):
        raise InvalidArgumentError(
            f"prompts is one {type(prompts).__name__}; give an iterable of prompts, such as [text]"
        )
    if not isinstance(prompts, Iterable | AsyncIterable if is_async else Iterable):
        raise InvalidArgumentError(f"prompts is {type(prompts).__name__}; give an iterable")
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise InvalidArgumentError(f"concurrency is {concurrency!r}, must be at least 1")


def map_in_order(
    start: Callable[[Item], Pending[Answer]],
    items: Iterable[Item],
    *,
    concurrency: int,
    progress: Progress,
    return_exceptions: bool,
) -> Generator[Answer | RedmuxError, None, None]:
    """Yields the answers in the order of the items, at most `concurrency` of them under way.

    Items are taken as there is room for them. Ending it early gives up what is under way.
    """
    source = iter(items)
    window: deque[Pending[Answer]] = deque()
    ended: SimpleQueue[None] = SimpleQueue()
    num_running = 0
    is_over = False
    with progress:
        try:
            while True:
                with suppress(Empty):
                    while True:
                        ended.get_nowait()
                        num_running -= 1
                while (
                    not is_over and num_running < concurrency and len(window) < _AHEAD * concurrency
                ):
                    try:
                        item = next(source)
                    except StopIteration:
                        is_over = True
                        break
                    window.append(_started(start, item))
                    num_running += 1
                    window[-1].tell(lambda: ended.put(None))
                if not window:
                    return
                if window[0].done():
                    answer = _outcome(window.popleft().result, return_exceptions)
                    progress.advance()
                    yield answer
                else:
                    ended.get()
                    num_running -= 1
        finally:
            for pending in window:
                pending.cancel()


def _started(start: Callable[[Item], Pending[Answer]], item: Item) -> Pending[Answer]:
    try:
        return start(item)
    except RedmuxError as error:
        return _Refused(error)


def _outcome(result: Callable[[], Answer], return_exceptions: bool) -> Answer | RedmuxError:
    try:
        return result()
    except RedmuxError as error:
        if not return_exceptions:
            raise
        return error


async def map_in_order_async(
    ask: Callable[[Item], Coroutine[Any, Any, Answer]],
    items: Iterable[Item] | AsyncIterable[Item],
    *,
    concurrency: int,
    progress: Progress,
    return_exceptions: bool,
) -> AsyncGenerator[Answer | RedmuxError, None]:
    """Does what `map_in_order` does, for coroutines, and for items that come asynchronously."""
    source = _iterated(items)
    window: deque[asyncio.Task[Answer]] = deque()
    upcoming: asyncio.Future[Item] | None = None
    is_over = False
    with progress:
        try:
            while True:
                running = [task for task in window if not task.done()]
                has_room = len(running) < concurrency and len(window) < _AHEAD * concurrency
                if upcoming is None and has_room and not is_over:
                    upcoming = asyncio.ensure_future(anext(source))
                if upcoming is not None and upcoming.done():
                    try:
                        window.append(asyncio.create_task(ask(upcoming.result())))
                    except StopAsyncIteration:
                        is_over = True
                    upcoming = None
                elif window and window[0].done():
                    answer = _outcome(window.popleft().result, return_exceptions)
                    progress.advance()
                    yield answer
                elif waited := _with(running, upcoming):
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                else:
                    return
        finally:
            left = _with(window, upcoming)
            for future in left:
                future.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            await source.aclose()


def _with(
    tasks: Iterable[asyncio.Task[Any]], upcoming: asyncio.Future[Any] | None
) -> list[asyncio.Future[Any]]:
    return [*tasks, *([] if upcoming is None else [upcoming])]


async def _iterated(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncGenerator[Item, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
