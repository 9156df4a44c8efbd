"""A call that was sent and that nobody waits for yet."""

# gRPC's futures take type arguments in their stubs only.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc

from redmux.errors import RedmuxError

Response = TypeVar("Response")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class StartedCall(Generic[Response, Value]):
    """One call, as `Connection.start` makes it."""

    _call: grpc.Future[Response]
    _value: Callable[[Response], Value]
    _error_of: Callable[[grpc.RpcError], RedmuxError]

    def result(self) -> Value:
        """Returns the value of the response, waiting for it."""
        try:
            return self._value(self._call.result())
        except grpc.RpcError as error:
            raise self._error_of(error) from None

    def done(self) -> bool:
        """Whether there is a result."""
        return self._call.done()

    def tell(self, ended: Callable[[], None]) -> None:
        """Calls `ended` once there is a result, from a thread of gRPC's."""
        self._call.add_done_callback(lambda _: ended())

    def cancel(self) -> None:
        """Ends the call."""
        self._call.cancel()
