"""Ending: calls that a stopping server gives up are told so, and not that they were cancelled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc

from redmux.errors import UnavailableError

_MOMENT_S = 0.05
_MOST_MOMENTS = 20


class Ending(grpc.aio.ServerInterceptor):
    """Knows the calls that are under way and ends them as unavailable.

    When a server stops, gRPC tells clients CANCELLED, of calls that are open after the grace and of
    those that have come but were not looked at. Nobody tries these again, and it reads as if the
    caller had cancelled.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._num_calls = 0
        self._is_refusing = False
        self._is_closing = False

    async def refuse_calls(self) -> None:
        """Ends every further call at once; returns when none has come for a moment."""
        self._is_refusing = True
        num_calls = -1
        for _ in range(_MOST_MOMENTS):
            if num_calls == self._num_calls:
                return
            num_calls = self._num_calls
            await asyncio.sleep(_MOMENT_S)

    def end_calls(self) -> None:
        """Ends all calls."""
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
            self._num_calls += 1
            if self._is_refusing:
                await _abort(context)
            self._tasks.add(task)
            try:
                return await method(request, context)
            except asyncio.CancelledError:
                if not self._is_closing:
                    raise
                task.uncancel()
                await _abort(context)
            finally:
                self._tasks.discard(task)

        return call


async def _abort(context: Any) -> NoReturn:
    metadata = (("redmux-error", UnavailableError.__name__),)
    await context.abort(UnavailableError.status, "the server is shutting down", metadata)
    raise AssertionError("abort does not return")
