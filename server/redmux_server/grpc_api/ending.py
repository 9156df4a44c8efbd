"""Ending: calls that a stopping server gives up are told so, and not that they were cancelled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from redmux.errors import UnavailableError


class Ending(grpc.aio.ServerInterceptor):
    """Knows the calls that are under way and ends them as unavailable.

    gRPC's own way to end them when a server stops tells clients CANCELLED, which nobody tries
    again, and which reads as if the caller had cancelled.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closing = False

    def end_calls(self) -> None:
        """Ends all calls, and every one that may still come."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        codec = handler.request_deserializer, handler.response_serializer
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._wrap(handler.unary_unary), *codec)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(self._wrap(handler.unary_stream), *codec)
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(self._wrap(handler.stream_unary), *codec)
        return grpc.stream_stream_rpc_method_handler(self._wrap(handler.stream_stream), *codec)

    def _wrap(self, method: Any) -> Any:
        async def call(request: Any, context: Any) -> Any:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                if self._is_closing:
                    raise asyncio.CancelledError
                return await method(request, context)
            except asyncio.CancelledError:
                if not self._is_closing:
                    raise
                task.uncancel()
                name = UnavailableError.__name__
                await context.abort(
                    UnavailableError.status,
                    "the server is shutting down",
                    (("redmux-error", name),),
                )
            finally:
                self._tasks.discard(task)

        return call
