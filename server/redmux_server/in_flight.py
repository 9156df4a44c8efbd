"""InFlight: how many bytes of messages the server holds, for each caller and for all of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from redmux.errors import DeadlineExceededError, ResourceExhaustedError

SHARE_BYTES = 64 << 20  # of one caller
_SHARES = 4  # that may be taken at a time
LARGEST = 4  # requests of the largest size that a caller may have under way
# What an open call holds beside its messages, in gRPC and here: 29 kB of a stream, rounded up.
CALL_BYTES = 32 << 10
# Requests of a caller that gRPC is taking at a time. The others stay unread: of those, HTTP/2 lets
# the client send no more than one window.
RECEIVING = 8
_RETRY_S = 1.0


class InFlight:
    """Counts the bytes of requests until their calls end, and of replies until they are sent.

    A caller is an API key, or a connection where none is needed. Belongs to the event loop.
    """

    def __init__(
        self,
        share_bytes: int = SHARE_BYTES,
        total_bytes: int = _SHARES * SHARE_BYTES,
        receiving: int = RECEIVING,
    ) -> None:
        """`share_bytes` is for each caller, `total_bytes` for all together.

        `receiving` is how many requests of a caller are received at a time.
        """
        self.share_bytes = share_bytes
        self.total_bytes = total_bytes
        self.num_bytes = 0
        self._receiving = receiving
        self._callers: dict[str, _Caller] = {}

    def fit(self, max_bytes: int) -> None:
        """Makes the shares wide enough for a few requests of this size."""
        self.share_bytes = max(self.share_bytes, LARGEST * max_bytes)
        self.total_bytes = max(self.total_bytes, _SHARES * self.share_bytes)

    @property
    def num_callers(self) -> int:
        """How many callers have open calls."""
        return len(self._callers)

    def begin(self, name: str) -> "CallBytes":
        """Returns the account of a new call of this caller.

        Raises ResourceExhaustedError where the caller, or the server, has too much open already.
        """
        caller = self._callers.get(name) or _Caller(name, self._receiving)
        call = CallBytes(self, caller)
        call.take(CALL_BYTES)
        caller.num_calls += 1
        self._callers[name] = caller
        return call

    def take(self, caller: "_Caller", num_bytes: int) -> None:
        """Counts bytes; raises ResourceExhaustedError where they are too many, counting none."""
        if caller.num_bytes + num_bytes > self.share_bytes:
            raise ResourceExhaustedError(
                f"your open calls and the replies that you have not read hold {caller.num_bytes} "
                f"bytes, and this needs {num_bytes} more; limit {self.share_bytes}. Read the "
                "replies or wait until some calls have ended",
                retry_after_s=_RETRY_S,
            )
        if self.num_bytes + num_bytes > self.total_bytes:
            raise ResourceExhaustedError(
                f"messages of all callers hold {self.num_bytes} bytes, and this needs {num_bytes} "
                f"more; limit {self.total_bytes}. Try again later",
                retry_after_s=_RETRY_S,
            )
        caller.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def end(self, caller: "_Caller", num_bytes: int) -> None:
        """Gives back what a call of the caller has taken."""
        caller.num_bytes -= num_bytes
        self.num_bytes -= num_bytes
        caller.num_calls -= 1
        if not caller.num_calls:
            del self._callers[caller.name]


class CallBytes:
    """What one call holds. `end` has to be called once it is over."""

    def __init__(self, in_flight: InFlight, caller: "_Caller") -> None:
        self._in_flight = in_flight
        self._caller = caller
        self._num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Counts a message of the call; raises ResourceExhaustedError as `InFlight.take` does."""
        self._in_flight.take(self._caller, num_bytes)
        self._num_bytes += num_bytes

    @property
    def must_wait(self) -> bool:
        """Whether `receive` has to wait for others of the caller first."""
        return self._caller.receiving.locked()

    async def receive(self, read: Callable[[], Awaitable[Any]], limit_s: float) -> Any:
        """Returns what `read` does, once few enough others of the caller are being received.

        Raises DeadlineExceededError where it takes longer than `limit_s` seconds from then on.
        """
        async with self._caller.receiving:
            try:
                async with asyncio.timeout(limit_s):
                    return await read()
            except TimeoutError:
                raise DeadlineExceededError(
                    f"the request did not arrive within {limit_s:g} s"
                ) from None

    def end(self, _: object = None) -> None:
        """Gives everything back."""
        self._in_flight.end(self._caller, self._num_bytes)


class _Caller:
    """Somebody with open calls."""

    def __init__(self, name: str, receiving: int) -> None:
        self.name = name
        self.num_bytes = 0
        self.num_calls = 0
        self.receiving = asyncio.Semaphore(receiving)
