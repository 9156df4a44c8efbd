"""The methods of a server that answers before it has them."""

from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import grpc

from redmux.errors import UnavailableError

_RETRY_AFTER_MS = "1000"


class LateMethods(grpc.GenericRpcHandler):
    """Every method of a server; all are UNAVAILABLE until `open`.

    The refusal says when to try again, in the way that gRPC's own retries heed, and reads nothing
    of the request. Methods are added as to a server, whose own can be added only before it starts.
    """

    def __init__(self) -> None:
        self._added: list[grpc.GenericRpcHandler] = []
        self._is_open = False

    def open(self) -> None:
        """Offers the methods that were added."""
        self._is_open = True

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """See grpc.aio.Server."""
        self._added += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See grpc.aio.Server, which has no use for them either."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See grpc.GenericRpcHandler."""
        if not self._is_open:
            # The kind whose handler is called before a message has come; callers see no difference.
            return grpc.stream_stream_rpc_method_handler(_refuse)
        found = (handler.service(handler_call_details) for handler in self._added)
        return next((method for method in found if method is not None), None)


async def _refuse(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    await context.abort(
        UnavailableError.status,
        "the server is loading its model; try again in a moment",
        (("redmux-error", UnavailableError.__name__), ("grpc-retry-pushback-ms", _RETRY_AFTER_MS)),
    )
    yield b""  # never: what streams has to be a generator
