"""Lists of messages on their way in and out: counted before they are walked."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, overload

from google.protobuf.message import Message

From = TypeVar("From")
To = TypeVar("To")
Reply = TypeVar("Reply", bound=Message)

PAGE_BYTES = 2 << 20  # of a list, so that its message stays below gRPC's usual limit


class Converted(Sequence[To]):
    """A repeated field as what `convert` makes of index and item, each when it is asked for.

    So whoever gets it can refuse its length before any item costs something.
    """

    def __init__(self, items: Sequence[From], convert: Callable[[int, From], To]) -> None:
        self._items = items
        self._convert = convert

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> To: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[To]: ...
    def __getitem__(self, index: int | slice) -> To | Sequence[To]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._convert(index, self._items[index])

    def __iter__(self) -> Iterator[To]:
        for index, item in enumerate(self._items):
            yield self._convert(index, item)


def fill_page(replies: Iterable[Reply], size: int) -> tuple[list[Reply], bool]:
    """Returns the first of some replies, as many as fit a page, and whether there are more.

    `size` is the most of them; they may be fewer where they are large, but one fits always.
    """
    page: list[Reply] = []
    num_bytes = 0
    for reply in replies:
        num_bytes += reply.ByteSize()
        if len(page) == size or (page and num_bytes > PAGE_BYTES):
            return page, True
        page.append(reply)
    return page, False
